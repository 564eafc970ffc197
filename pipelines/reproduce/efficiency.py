"""Data efficiency (section 4.4): patches and full images at equal cost, with fewer and more training images."""

from pathlib import Path
from statistics import mean

from patchloom.errors import UserError
from patchloom.pipelines.pages.html import Number, Table
from patchloom.pipelines.reproduce.outcome import Finding, Outcome
from patchloom.pipelines.reproduce.samplers import data_of
from patchloom.pipelines.reproduce.stages import ReproductionFolder, Stage, data_stages, search_stage
from patchloom.pipelines.tune.amounts import (
    MEASURED_TITLES,
    MEMORISED_SHARE,
    amounts_of_data,
    chance_by_amount,
    decided_by_amount,
)
from patchloom.pipelines.tune.frontier import FINAL_DISTANCE
from patchloom.pipelines.tune.page import search_section
from patchloom.pipelines.tune.ranking import HELD_OUT_LOSS
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import clock
from patchloom.platform.records.search import read_trials

EFFICIENCY_DATA = "cat"
MEASURES = (HELD_OUT_LOSS, FINAL_DISTANCE, MEMORISED_SHARE)


def efficiency_stages(place: ReproductionFolder) -> list[Stage]:
    """Prepare data, and search over the number of training images."""
    name, small = data_of(place, EFFICIENCY_DATA), place.asked.small
    search = "data_search_cpu" if small else "data_search"
    stages = list(data_stages(place, name, small, latents=False))
    return [*stages, search_stage(place, name, search, place.dataset(name, latents=False))]


def efficiency_outcome(place: ReproductionFolder, here: Path) -> Outcome:
    """Quality and memorised samples by the number of training images, with what the seeds decide."""
    name = data_of(place, EFFICIENCY_DATA)
    trials = read_trials(Folder.at(here / name / "search"))
    amounts = amounts_of_data(trials)
    if amounts is None:
        raise UserError(f"{here / name / 'search'} has no trials with different numbers of images: see its page")
    findings = []
    for field in MEASURES:
        values = amounts.values(field)
        rows = [
            [title, *(f"{mean(line[images].values()):.4f}" if images in line else "" for images in amounts.images)]
            for title, line in values.items()
        ]
        chance = chance_by_amount(amounts) if field == MEMORISED_SHARE else {}
        if chance:  # not measured with very many training images
            shown = (f"{chance[images]:.4f}" if images in chance else "" for images in amounts.images)
            rows.append(["held-out images (chance)", *shown])
        header = ["setting", *(f"{images:,} images" for images in amounts.images)]
        measured = MEASURED_TITLES[field]
        title = f"{measured[0].upper()}{measured[1:]}, means over seeds"
        findings.append(Finding(title, Table(header, rows), [decided_by_amount(amounts, field)]))
    card = open_dataset(place.dataset(name, latents=False)).card
    return Outcome(
        lead="Patches (p = 0.5) and full images without coordinates, at equal FLOPs, on few and many images.",
        numbers=[
            Number("trials", f"{len(trials)}"),
            Number("TFLOP of training", f"{sum(trial.flops or 0 for trial in trials) / 1e12:,.1f}"),
            Number("time of trials", clock(sum(trial.seconds or 0 for trial in trials))),
        ],
        findings=findings,
        texts=[],
        differences=[
            f"{card.rows:,} rows of {card.resolution} x {card.resolution} x {card.channels} {card.kind}.",
            "The paper has one number of images per dataset, about 5,000 (Table 4), compares at equal counted images, "
            "and measures FID. It does not measure how many samples are near to training images.",
        ],
        details=[("The search", search_section(here / name / "search"))],
    )
