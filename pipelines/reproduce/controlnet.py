"""ControlNet (section 4.3): patches and full images in fine-tuning a ControlNet of a frozen Stable Diffusion."""

from pathlib import Path

from patchloom.errors import UserError
from patchloom.models.conditions import depth_to_space
from patchloom.models.controlnet import BASE_FOLDER
from patchloom.pipelines.pages.html import Number, Picture, Table
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.recipes import counted, shape_of_recipe
from patchloom.pipelines.reproduce.outcome import SHOWN_SAMPLES, Finding, Outcome, cost_ratio
from patchloom.pipelines.reproduce.samplers import data_of
from patchloom.pipelines.reproduce.stages import (
    SMALL_LATENTS_SIDE,
    ReproductionFolder,
    Stage,
    data_stages,
    search_stage,
    training_stage,
)
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.pipelines.tune.frontier import COST_TITLES, EqualCostComparison, compare_at_equal_cost, decision
from patchloom.pipelines.tune.page import search_section
from patchloom.pipelines.tune.ranking import mean_of
from patchloom.pipelines.tune.trials import trial_name
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import clock
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.recipe.search import load_search
from patchloom.platform.records.run import last_progress
from patchloom.platform.records.search import read_trials

CONTROL_DATA, CAPTIONS = "edits", "captions"  # the data of Brooks et al. (2023), which the paper uses
RESOLUTION, CONTROL_KIND = 512, "edges"
CONTROL_SEARCH = "controlnet_search_cpu"
SMALL_BASE = "patchloom.benchmarks.small_base"
SYSTEMS = ("controlnet_full", "controlnet")  # full images, then patches
NAMES = {"patches": "patches, p = 0.5", "full": "full images, no coordinates"}
CONTROL_SEEDS = "0-11"


def controlnet_stages(place: ReproductionFolder) -> list[Stage]:
    """Prepare images with edges and texts, train a ControlNet in both ways, and sample with edges."""
    return _small_stages(place) if place.asked.small else _full_stages(place)


def _full_stages(place: ReproductionFolder) -> list[Stage]:
    data, base = place.path("data", CONTROL_DATA), str(load_recipe("controlnet").model.base)
    missing = [name for name in (CONTROL_DATA, CAPTIONS) if name not in place.asked.data]
    if missing:
        raise UserError(f"controlnet at full size needs images and their captions: give --data {missing[0]}=SOURCE")
    encoder = ("--autoencoder", place.asked.autoencoder) if place.asked.autoencoder else ()
    words = ("prepare", place.source(CONTROL_DATA), data, "--resolution", str(RESOLUTION), "--condition", CONTROL_KIND)
    texts = ("--text", place.source(CAPTIONS), "--text-encoder", base)
    stages = [Stage("Encode images, edges and captions", (*words, *texts, *encoder))]
    for name in SYSTEMS:
        stages.append(training_stage(place, f"Train {name}", name, (), data, (name, "run")))
        stages.append(_sampling(place, name, place.path(name, "run")))
    return stages


def _small_stages(place: ReproductionFolder) -> list[Stage]:
    if CAPTIONS in place.asked.data:
        raise UserError(f"--data {CAPTIONS}=... has no effect on controlnet --small, which has a text per class")
    name = data_of(place, CONTROL_DATA)
    pixels, latents = place.reference(name, latents=True), place.dataset(name, latents=True)
    *prepared, encode = data_stages(place, name, small=True, latents=True, condition=CONTROL_KIND)
    texts, base = place.path("texts.npz"), place.path("base")
    setting = ((BASE_FOLDER, base),)
    search = search_stage(place, name, CONTROL_SEARCH, latents, setting)
    return [
        *prepared,
        Stage("Write a text embedding for each class", ("texts", pixels, texts), module=SMALL_BASE),
        Stage(encode.title, (*encode.words, "--text", texts)),
        Stage("Train a small base", ("train", latents, base), module=SMALL_BASE),
        search,
        *(
            _sampling(place, way, place.path(name, "search", "trials", trial), setting)
            for way, trial in _trials_of_first_seed().items()
        ),
    ]


def _trials_of_first_seed() -> dict[str, str]:
    """The trials of both ways that spend the budget, by name: all seeds of a setting come before the next setting."""
    search, _ = load_search(CONTROL_SEARCH)
    return {way: trial_name(number * search.repeats) for number, way in enumerate(NAMES)}


def _sampling(place: ReproductionFolder, name: str, model: str, environment: tuple[tuple[str, str], ...] = ()) -> Stage:
    conditions = place.dataset(data_of(place, CONTROL_DATA), latents=True)
    words = ("sample", model, place.path("samples", name), "--seeds", CONTROL_SEEDS, "--conditions", conditions)
    return Stage(f"Sample with edges: {name}", words, environment=environment)


def controlnet_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    """The held-out losses and costs of both ways, with samples that follow the same edges."""
    return _small_outcome(place, here) if place.asked.small else _full_outcome(place, here)


def _full_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    rows = []
    for name in SYSTEMS:
        line = last_progress(here / name / "run")
        loss = "" if line.held_out_loss is None else f"{line.held_out_loss:.4f}"
        rows.append([name, f"{line.updates:,}", f"{line.images_seen:,}", f"{line.flops / 1e12:,.0f}", loss])
    header = ["recipe", "updates", "counted images", "TFLOP", "held-out loss"]
    return Outcome(
        lead="A ControlNet of Stable Diffusion 1.5 from edges, fine-tuned on patches and on full images for as many "
        "updates (section 4.3 of Wang et al. 2023).",
        numbers=[Number("time of all commands", clock(sum(stage.seconds for stage in place.asked.stages)))],
        findings=[Finding("Both ways, one training each", Table(header, rows))],
        texts=[],
        differences=[
            "The paper controls by HED maps, here by Canny's edges. It states neither p nor the batch nor the learning "
            "rate, and shows pictures without a number.",
        ],
        pictures=[_samples_picture(place, here, SYSTEMS)],
    )


def _small_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    name = data_of(place, CONTROL_DATA)
    trials = read_trials(Folder.at(here / name / "search"))
    comparisons = {by: compare_at_equal_cost(trials, by) for by in ("images_seen", "flops")}
    by_images = comparisons["images_seen"]
    recipe = load_recipe("controlnet_small")
    counts = counted(recipe, shape_of_recipe(recipe))
    card = open_dataset(place.dataset(name, latents=True)).card
    return Outcome(
        lead="A ControlNet from edges, fine-tuned on patches and on full images (section 4.3 of Wang et al. 2023), in "
        "small.",
        numbers=[
            Number("trials", f"{len(trials)}"),
            Number("TFLOP of training", f"{sum(trial.flops or 0 for trial in trials) / 1e12:,.1f}"),
            Number("time of trials", clock(sum(trial.seconds or 0 for trial in trials))),
        ],
        findings=[_finding(by, comparison) for by, comparison in comparisons.items() if comparison],
        texts=_cost(by_images) if by_images else [],
        differences=[
            f"{card.rows:,} latents of {SMALL_LATENTS_SIDE} x {SMALL_LATENTS_SIDE} pixels, and a base that was trained "
            f"for minutes ({counts.parameters / 1e6:.1f} M trained parameters), instead of Stable Diffusion 1.5.",
            "Canny's edges instead of HED maps; texts are a random embedding per class.",
            "The paper states neither p nor a number for the quality: it shows pictures, and says that training is "
            "about two times faster without a loss of quality.",
        ],
        pictures=[_samples_picture(place, here, tuple(NAMES))],
        details=[("The search", search_section(here / name / "search"))],
    )


def _way(settings: dict[str, object]) -> str:
    return NAMES["patches" if settings["patches.p"] == 0.5 else "full"]


def _finding(by: str, comparison: EqualCostComparison) -> Finding:
    other, title = ("flops", "TFLOP") if by == "images_seen" else ("images_seen", "counted images")
    rows = []
    for one in comparison.order:
        spent = mean_of(one.trials, other) or 0
        shown = f"{spent / 1e12:,.1f}" if other == "flops" else f"{spent:,.0f}"
        rows.append([_way({**one.settings}), one.value(), shown])
    best = comparison.order[0]
    text = f"{_way({**best.settings})}: lowest held-out loss, {best.value_of_n()}. {decision(comparison.order)}"
    seeds = len(best.trials)
    heading = f"At equal {COST_TITLES[by]}: mean ± standard deviation over {seeds} seeds"
    return Finding(heading, Table(["training", "held-out loss on full images", title], rows), [text])


def _cost(comparison: EqualCostComparison) -> list[str]:
    ways = {_way({**one.settings}): one for one in comparison.order}
    return cost_ratio(ways.get(NAMES["patches"]), ways.get(NAMES["full"]))


def _samples_picture(place: ReproductionFolder, here: Path, names: tuple[str, ...]) -> Picture:
    """The edges, then samples of each model with them."""
    folders = [place.folder.folder(f"samples/{name}") for name in names]
    images = [read_samples(folder, list(read_entries(folder))[:SHOWN_SAMPLES]) for folder in folders]
    dataset = open_dataset(place.dataset(data_of(place, CONTROL_DATA), latents=True))
    stored = dataset.rows(range(len(images[0])), ["condition"])["condition"]
    downscale = dataset.card.condition.downscale if dataset.card.condition else 1
    path = here / "controlled.png"
    shown = depth_to_space(stored, downscale)[:, :1].repeat(3, axis=1)
    save_png(side_by_side([shown, *images], scale=max(1, 64 // images[0].shape[2])), path)
    return Picture(path, f"The edges, then samples that follow them: {', '.join(names)}.", pixelated=True)
