"""Plans: what a run or a search would be and cost, in words, before anything starts."""

from patchloom.pipelines.train import describe_plan
from patchloom.pipelines.tune import plan_trials
from patchloom.platform.dataset import open_dataset
from patchloom.platform.recipe import Recipe, load_search


def run_plan(recipe: Recipe, dataset: str, workers: int = 1, measure: bool = False) -> str:
    """Parameters, FLOPs a crop by patch size, expected counts and memory of a run, and what its patches save."""
    plan = describe_plan(recipe, dataset, workers, measure)
    lines = [
        f"{recipe.name}: {plan['parameters']:,} parameters on {plan['train_rows']:,} training rows",
        f"  {'patch':>6}  {'share of updates':>16}  {'crops':>12}  {'GFLOP a crop':>12}",
    ]
    lines += [
        f"  {size['pixels']:>4}px  {size['share_of_updates']:>16.1%}  {size['crops']:>12,}  "
        f"{size['flops_per_crop'] / 1e9:>12.3f}"
        for size in plan["sizes"]
    ]
    return "\n".join([
        *lines,
        f"  {plan['updates']:,} updates, {plan['crops']:,} counted images (crops), "
        f"{plan['full_size_images']:,} full-size images",
        f"  {plan['flops'] / 1e12:,.2f} TFLOP in all (forward and backward)",
        f"  {plan['state_bytes'] / 2**20:,.0f} MiB of weights, gradients, optimiser and averages a worker, "
        "activations not counted",
        f"  gain over p = 1 on {workers} worker{'s' if workers > 1 else ''}, "
        + ("from seconds measured here:" if measure else "from FLOPs (--measure times them here):"),
        *(
            f"    {draw:<11}  {gain.per_image:.2f}x a counted image, {gain.per_update:.2f}x an update"
            for draw, gain in plan["gains"].items()
        ),
    ])  # fmt: skip


def search_plan(search: str, dataset: str) -> str:
    """Each trial of a search with its counts and cost."""
    definition, base = load_search(search)
    planned = plan_trials(definition, base, open_dataset(dataset))
    lines = [f"{definition.name}: {len(planned)} trials"]
    total = 0
    for number, (setting, recipe) in enumerate(zip(definition.settings(), planned, strict=True)):
        plan = describe_plan(recipe, dataset)
        total += plan["flops"]
        what = ", ".join(f"{key}={value}" for key, value in setting.items())
        lines.append(
            f"  {number:>3}  {what}: {plan['updates']:,} updates, {plan['crops']:,} counted images, "
            f"{plan['flops'] / 1e12:,.3f} TFLOP"
        )
    return "\n".join([*lines, f"  {total / 1e12:,.3f} TFLOP in all"])
