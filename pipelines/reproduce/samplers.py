"""The samplers of the paper's Table 1 and the others, on one model: quality against network evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from patchloom.models.generate import Sampling
from patchloom.models.sampling_options import SAMPLER_NAMES
from patchloom.pipelines.evaluate.page import METRICS_FILE
from patchloom.pipelines.pages.html import Number, Picture, Table, svg, tidy
from patchloom.pipelines.pages.pictures import save_png, side_by_side
from patchloom.pipelines.registry.quality import TITLES
from patchloom.pipelines.reproduce.outcome import Finding, Outcome
from patchloom.pipelines.reproduce.stages import (
    PHOTOGRAPHS_DATA,
    ReproductionFolder,
    Stage,
    data_stages,
    samples_flops,
    training_stage,
)
from patchloom.pipelines.sample.folder import read_entries, read_samples
from patchloom.platform.progress import clock
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.records.evaluation import EvaluationResult

SAMPLERS_DATA = "celeba"
EVALUATIONS = (5, 11, 25, 49)  # of the network per image; those of Heun are odd
SMALL_COUNT, FULL_COUNT = 256, 10_000  # samples of each sampler
SMALL_SETTINGS = ("model.width=16", "train.images=100000")
SHOWN_SEEDS = 12
# FID on CelebA-64 after 1000 evaluations, and of Heun after 99 (Wang et al. 2023, Table 1)
PAPER_FIDS = (
    "DDIM 3.51, DDPM 3.26, NCSN++ 3.25, PNDM 2.71 and DDPM++ 1.90 with 1,000 steps, EDM 1.66 and patches 1.77 with 50"
)


def model_stages(
    place: ReproductionFolder, data: str, recipe: str, changes: Sequence[str], latents: bool
) -> tuple[list[Stage], str]:
    """The commands that prepare data and train a model on them, unless one was given; and the address of the model."""
    name = data_of(place, data)
    stages = list(data_stages(place, name, place.asked.small, latents))
    if place.asked.model is not None:
        return stages, place.asked.model
    dataset = place.dataset(name, latents)
    return [*stages, training_stage(place, "Train a model", recipe, changes, dataset, ("run",))], place.path("run")


def data_of(place: ReproductionFolder, data: str) -> str:
    """The name of the data: the paper's, or the photographs."""
    return data if data in place.asked.data else PHOTOGRAPHS_DATA


@dataclass(frozen=True)
class SamplerCurve:
    """A sampler's distances by network evaluations, each with its interval where it was measured."""

    sampler: str
    distances: dict[int, float]
    intervals: dict[int, tuple[float, float]]


def sampler_stages(place: ReproductionFolder) -> list[Stage]:
    """Train a model, and sample with every sampler at every number of evaluations."""
    name, changes = ("celeba64_small", SMALL_SETTINGS) if place.asked.small else ("celeba64", ())
    stages, model = model_stages(place, SAMPLERS_DATA, name, changes, latents=False)
    recipe, count = load_recipe(name, list(changes)), SMALL_COUNT if place.asked.small else FULL_COUNT
    for sampler in SAMPLER_NAMES:
        for evaluations in EVALUATIONS:
            out, steps = place.path(*_samples(sampler, evaluations)), steps_for(sampler, evaluations)
            words = ("sample", model, out, "--seeds", f"0-{count - 1}", "--sampler", sampler, "--steps", str(steps))
            title = f"{sampler} with {evaluations} evaluations"
            stages.append(Stage(f"Sample with {title}", words, samples_flops(recipe, count, steps, sampler=sampler)))
            reference = place.reference(data_of(place, SAMPLERS_DATA), False)
            measured = ("evaluate", out, "--reference", reference, "--features", place.asked.features)
            stages.append(Stage(f"Measure {title}", measured))
    return stages


def steps_for(sampler: str, evaluations: int) -> int:
    """The most steps with which a sampler evaluates the network at most so many times. Heun's have two evaluations."""
    counts = (
        (steps, Sampling(sampler=sampler, steps=steps).network_evaluations) for steps in range(evaluations, 0, -1)
    )
    return next(steps for steps, count in counts if count <= evaluations)


def _samples(sampler: str, evaluations: int) -> tuple[str, str]:
    return "samples", f"{sampler}-{evaluations}"


def sampler_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    """Distances over evaluations as a plot and a table, with samples of the same seeds."""
    results = {
        (sampler, evaluations): EvaluationResult.read(here.joinpath(*_samples(sampler, evaluations), METRICS_FILE))
        for sampler in SAMPLER_NAMES
        for evaluations in EVALUATIONS
    }
    metric = next(name for name in TITLES if name in next(iter(results.values())).metrics)
    curves = [_curve(sampler, metric, results) for sampler in SAMPLER_NAMES]
    rows = [[curve.sampler, *(_cell(curve, evaluations) for evaluations in EVALUATIONS)] for curve in curves]
    header = ["sampler", *(f"{evaluations} evaluations" for evaluations in EVALUATIONS)]
    first = next(iter(results.values())).identity
    title = TITLES[metric][0]
    return Outcome(
        lead="The samplers of Patchloom on one model: ancestral is DDPM's, plms is PNDM's. Every sampler has the same "
        "network evaluations in a column, and the same seeds.",
        numbers=[
            Number("samples of each", f"{first.n_samples:,}"),
            Number("images of the reference", f"{first.n_reference or 0:,}"),
            Number("time of all commands", clock(sum(stage.seconds for stage in place.asked.stages))),
        ],
        findings=[
            Finding(
                f"{title} ({first.features}), with its 95 % interval over draws of samples",
                Table(header, rows),
                [_ahead(curves, evaluations, title) for evaluations in EVALUATIONS],
            )
        ],
        texts=[],
        differences=[
            f"The paper's Table 1 compares models that others trained, each with its own sampler (FID on CelebA-64: "
            f"{PAPER_FIDS}). Here only the sampler differs.",
            "All samplers use the noise levels of EDM (--ladder karras).",
            f"The interval is for other draws of {first.n_samples:,} samples from this model. Another training was not "
            "tried.",
        ],
        figures=[(_plot(curves, title), f"{title} over network evaluations per image. Bars: the 95 % interval.")],
        pictures=[_picture(place, here)],
    )


def _curve(sampler: str, metric: str, results: dict[tuple[str, int], EvaluationResult]) -> SamplerCurve:
    distances, intervals = {}, {}
    for evaluations in EVALUATIONS:
        metrics = results[sampler, evaluations].metrics
        value, interval = metrics[metric], metrics.get(f"{metric}_interval_95")
        assert isinstance(value, float)
        distances[evaluations] = value
        if isinstance(interval, list):
            intervals[evaluations] = (float(str(interval[0])), float(str(interval[1])))
    return SamplerCurve(sampler, distances, intervals)


def _cell(curve: SamplerCurve, evaluations: int) -> str:
    interval = curve.intervals.get(evaluations)
    shown = f" ({interval[0]:.3g} to {interval[1]:.3g})" if interval else ""
    return f"{curve.distances[evaluations]:.3g}{shown}"


def _ahead(curves: Sequence[SamplerCurve], evaluations: int, title: str) -> str:
    """Which sampler is ahead at a number of evaluations, and which ones are not distinguished from it."""
    order = sorted(curves, key=lambda curve: curve.distances[evaluations])
    best = order[0]
    end = best.intervals.get(evaluations, (0.0, float("inf")))[1]
    near = [curve.sampler for curve in order[1:] if curve.intervals.get(evaluations, (0.0, 0.0))[0] <= end]
    ahead = f"{evaluations} evaluations: {best.sampler} has the lowest {title}"
    if not near:
        return f"{ahead}, and no other interval overlaps with its own."
    return f"{ahead}. Intervals that overlap with its own: {', '.join(near)}."


def _plot(curves: Sequence[SamplerCurve], title: str) -> Markup:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        x, y = list(curve.distances), list(curve.distances.values())
        shifted = [one * (1 + 0.012 * (number - len(curves) / 2)) for one in x]  # so that bars do not hide each other
        axes.plot(shifted, y, marker="o", markersize=4, color=f"C{number}", label=curve.sampler)
        for place, evaluations in zip(shifted, x, strict=True):
            if evaluations in curve.intervals:
                axes.vlines(place, *curve.intervals[evaluations], color=f"C{number}", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(EVALUATIONS, [str(one) for one in EVALUATIONS])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("network evaluations per image")
    axes.set_ylabel(title)
    tidy(axes)
    return svg(figure)


def _picture(place: ReproductionFolder, here: Path) -> Picture:
    """The same seeds of every sampler with the second number of evaluations, one row each."""
    rows = []
    for sampler in SAMPLER_NAMES:
        folder = place.folder.folder("/".join(_samples(sampler, EVALUATIONS[1])))
        rows.append(read_samples(folder, list(read_entries(folder))[:SHOWN_SEEDS]))
    path = here / "samplers.png"
    save_png(side_by_side(rows, scale=max(1, 64 // rows[0].shape[2])), path)
    caption = f"The same seeds in each row, with {EVALUATIONS[1]} evaluations: {', '.join(SAMPLER_NAMES)}."
    return Picture(path, caption, pixelated=True)
