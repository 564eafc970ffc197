"""The commands that train: an autoencoder, one recipe, or a search over recipes."""

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.cli.completion import recipe_names, search_names
from patchloom.pipelines.cli.options import (
    Backbones,
    Gpus,
    ResourceSettings,
    Settings,
    TrainWorkers,
    Wait,
    chosen_resources,
    is_prepared,
    required_out,
)
from patchloom.pipelines.cli.output import Printed, printed_plan
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import whole_number

if TYPE_CHECKING:
    from patchloom.pipelines.train.data_shape import DataShape
    from patchloom.platform.compute.resources import Resources
    from patchloom.platform.recipe.run_recipe import Recipe

RunFolder = Annotated[str | None, typer.Option(help="Run folder to write; required without --dry-run")]
MinWorkers = Annotated[
    int | None,
    typer.Option(min=1, help="Continue with at least this many workers after a node is lost  [default: --workers]"),
]
Microbatch = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most images of a batch on a device at once, to save memory; the batch stays the same  [default: all]",
    ),
]
Like = Annotated[
    str | None,
    typer.Option(
        metavar="HxWxC",
        help="With --dry-run: estimate for images or latents of this height, width and channels, such as 64x64x3, "
        "instead of a dataset",
    ),
]
LikeClasses = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="With --like: number of classes  [default: 0]")
]
LikeCondition = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="With --like: channels of the condition images  [default: 0]")
]
MaxHours = Annotated[
    float | None,
    typer.Option(
        min=0.001, help="Stop with a checkpoint before so many hours have passed (exit code 143)  [default: never]"
    ),
]


def autoencoder_train(
    dataset: Annotated[str, typer.Argument(help="Prepared dataset of pixels")],
    out: Annotated[str, typer.Option(help="Run folder to write")],
    widths: Annotated[
        str, typer.Option(help="Channels of each level, from full size down; each further level halves the image")
    ] = "16,32,32",
    latent_channels: Annotated[int, typer.Option(min=1, help="Channels of a latent")] = 4,
    images: Annotated[int, typer.Option(min=1, help="Number of patches to train on")] = 7_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Patches per update")] = 8,
    patch: Annotated[int, typer.Option(min=1, help="Width and height of the patches, in pixels")] = 32,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Peak learning rate of Adam  [default: 2e-3; 1e-4 with --init-from]")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Fine-tune an existing AutoencoderKL: models:/NAME/VERSION, a folder, or a Hugging Face name"
        ),
    ] = None,
    workers: TrainWorkers = None,
    gpus: Gpus = None,
    resources: ResourceSettings = None,
    wait: Wait = None,
    max_hours: MaxHours = None,
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the autoencoder in MLflow under this name")
    ] = None,
) -> Printed:
    """Train or fine-tune an autoencoder, and measure it.

    The network is an AutoencoderKL of diffusers. PSNR and SSIM of held-out images are printed at the end. Run the
    same command again to continue an interrupted run.
    """
    nodes = chosen_resources(resources, wait, workers, gpus)
    from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder

    settings = AutoencoderSettings(
        _whole_numbers(widths), latent_channels, images, batch_size, patch,
        lr=lr if lr is not None else 1e-4 if init_from else 2e-3, init_from=init_from,
    )  # fmt: skip
    made = train_autoencoder(
        dataset,
        out,
        settings,
        workers=train_workers(nodes),
        register=register,
        resources=nodes,
        max_hours=_remaining(max_hours),
    )
    return Printed(asdict(made))


def _remaining(max_hours: float | None) -> float | None:
    """The part of --max-hours that is left of a command that has begun with this process."""
    import psutil

    return None if max_hours is None else max_hours - (time.time() - psutil.Process().create_time()) / 3600


def train_workers(resources: "Resources") -> int:
    """The number of Ray Train workers; 1 by default."""
    return 1 if resources.workers is None else resources.workers


def _whole_numbers(widths: str) -> tuple[int, ...]:
    parts = widths.split(",")
    numbers = [whole_number(part.strip()) for part in parts]
    if None in numbers:
        raise UserError(f"--widths {widths} is not a list of whole numbers: write it as 16,32,32")
    return tuple(number for number in numbers if number is not None)


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Recipe: a YAML file, or the name of a shipped recipe; with --resume alone, the run folder",
            autocompletion=recipe_names,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Prepared dataset: a folder or a remote address; with --resume, the run knows it")
    ] = None,
    out: RunFolder = None,
    set_: Settings = None,
    workers: TrainWorkers = None,
    gpus: Gpus = None,
    min_workers: MinWorkers = None,
    resources: ResourceSettings = None,
    wait: Wait = None,
    max_hours: MaxHours = None,
    microbatch: Microbatch = None,
    compile_: Annotated[
        bool,
        typer.Option("--compile", help="Compile the network for each patch size: minutes at the start, then faster"),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Report the three most expensive parts of a step and write a trace")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue a run from its newest checkpoint: train --resume RUN; --set train.images=N makes it longer",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the size, cost and length of the run, then exit")
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="With --dry-run: measure the seconds per step of each patch size")
    ] = False,
    like: Like = None,
    like_classes: LikeClasses = None,
    like_condition: LikeCondition = None,
    allow_backbone: Backbones = None,
) -> Printed:
    """Train a recipe on a prepared dataset."""
    from patchloom.pipelines.train.resuming import dataset_of_run, recipe_of_run
    from patchloom.platform.recipe.run_recipe import load_recipe

    allow_backbones(*allow_backbone or [])
    if resume and out is None:
        recipe, out = None, recipe
    check_like(like, like_classes or like_condition, data, dry_run)
    nodes = chosen_resources(resources, wait, workers, gpus)
    run = required_run(recipe, data or like, out, resume)
    check_recipe_argument(recipe)
    loaded = load_recipe(recipe, set_ or []) if recipe else recipe_of_run(run, set_ or [])
    if dry_run:
        from patchloom.pipelines.train.dry_run import describe_plan

        shape = like_shape(like, like_classes, like_condition, loaded)
        dataset = shape or data or dataset_of_run(run)
        plan = describe_plan(loaded, dataset, max(1, train_workers(nodes)), measure, microbatch)
        return printed_plan(plan, flops=plan.flops, crops=plan.crops, full_size_images=plan.full_size_images)
    from patchloom.pipelines.train.training import train

    result = train(
        loaded, data or dataset_of_run(run), required_out(out, "run"), workers=train_workers(nodes),
        min_workers=min_workers or nodes.min_workers, microbatch=microbatch, compile=compile_, profile=profile,
        resume=resume, resources=nodes, max_hours=_remaining(max_hours),
    )  # fmt: skip
    folder = Folder.at(result.address)
    model, last = str(folder.folder("model")), result.last.model_dump(mode="json", exclude_unset=True)
    text = f"model: {model}\nregister it: patchloom models register {folder} NAME --alias champion"
    return Printed({"run": str(folder), "model": model, "run_id": result.run_id, "last": last}, text)


def check_recipe_argument(recipe: str | None) -> None:
    """Raise UserError for a dataset in the place of a recipe or a search."""
    if recipe and is_prepared(recipe):
        raise UserError(f"{recipe} is a prepared dataset: give a recipe or a search first, and --data {recipe}")


def required_run(recipe: str | None, data: str | None, out: str | None, resume: bool) -> str:
    """The run that knows what is not given; raises UserError where something is missing that no run knows."""
    for value, name in ((recipe, "RECIPE"), (data, "--data")):
        if not value and not (resume and out):
            raise UserError(f"{name} is missing: see patchloom train --help, or continue a run with --resume RUN")
    return out or ""


def recipes() -> Printed:
    """List the shipped recipes and searches with their costs."""
    from patchloom.pipelines.recipes import recipes_text, shipped_recipes

    found = shipped_recipes()
    return Printed([recipe.to_json() for recipe in found], recipes_text(found))


def check_like(like: str | None, more: int | None, data: str | None, dry_run: bool) -> None:
    """Raise UserError where --like, or `more`, the value of an option that describes it further, has no meaning."""
    if like is None and more is not None:
        raise UserError("--like-classes and --like-condition need --like: those of a dataset are known")
    if like is not None and not dry_run:
        raise UserError(f"--like {like} is for --dry-run: add it, or give a dataset with --data")
    if like is not None and data is not None:
        raise UserError(f"--like {like} and --data {data} are two kinds of data: leave one of them out")


def like_shape(like: str | None, classes: int | None, condition: int | None, recipe: "Recipe") -> "DataShape | None":
    """The shape that --like gives; raises UserError if it is not one."""
    from patchloom.pipelines.train.data_shape import DataShape

    return None if like is None else DataShape.parse(like, classes or 0, condition or 0, recipe.data.kind)


def tune(
    search: Annotated[
        str, typer.Argument(help="Search: a YAML file, or the name of a shipped search", autocompletion=search_names)
    ],
    data: Annotated[
        str | None, typer.Option(help="Prepared dataset: a folder or a remote address; only --like goes without")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Search folder to write; required without --dry-run")] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="Continue a stopped search; finished trials are kept")
    ] = False,
    add_seeds: Annotated[
        int, typer.Option(min=0, metavar="N", help="With --restore: run N further seeds of each setting")
    ] = 0,
    concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials that run in parallel  [default: as many as fit]")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Ray Train workers per trial; 0 trains in the trial's own process  [default: 0]"),
    ] = None,
    resources: ResourceSettings = None,
    wait: Wait = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="GPUs per trial, such as 0.25 for four trials on one GPU, or per worker of a trial  "
            "[default: 1 if the cluster has or can start GPUs, otherwise 0]",
        ),
    ] = None,
    register_best: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the model of the best trial under this name")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the trials, their cost and the expected time, then exit")
    ] = False,
    like: Like = None,
    like_classes: LikeClasses = None,
    like_condition: LikeCondition = None,
    allow_backbone: Backbones = None,
) -> Printed:
    """Search recipe keys in short runs of equal cost.

    The result is a ranking of the values of p, the schedule or other keys, with a page that shows it.
    """
    check_recipe_argument(search)
    check_like(like, like_classes or like_condition, data, dry_run)
    if not data and not like:
        raise UserError("--data is missing: give a prepared dataset, or --like with --dry-run")
    nodes = chosen_resources(resources, wait, workers, gpus, for_trials=True)
    from patchloom.platform.compute.tuner import TuneResources

    allow_backbones(*allow_backbone or [])
    if dry_run:
        from patchloom.pipelines.tune.dry_run import describe_search
        from patchloom.platform.recipe.search import load_search

        shape = like_shape(like, like_classes, like_condition, load_search(search)[1])
        parallel = TuneResources(concurrent, nodes.workers or 0).parallel_trials(os.cpu_count() or 1) or 1
        return printed_plan(describe_search(search, shape or data or "", parallel))
    from patchloom.pipelines.tune.tuning import tune

    assert data is not None  # --like is only for --dry-run
    result = tune(
        search, data, required_out(out, "search"), restore=restore, add_seeds=add_seeds,
        concurrent=concurrent,
        workers=nodes.workers or 0, register_best=register_best, resources=nodes,
    )  # fmt: skip
    best = f"{Folder.at(result.address)}/best.yaml"
    value = {
        "search": result.address,
        "run_id": result.run_id,
        "best": best,
        "trials": [trial.to_dict() for trial in result.trials],
    }
    return Printed(value, f"train the best at full length: patchloom train {best} --data {data} --out RUN")
