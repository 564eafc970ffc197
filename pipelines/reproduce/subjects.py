"""Subjects: everything that can be reproduced, by name, each with its commands and its page."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from patchloom.pipelines.reproduce import controlnet, efficiency, extrapolation, samplers, speed
from patchloom.pipelines.reproduce.outcome import Outcome, table_outcome
from patchloom.pipelines.reproduce.paper import TABLES, PaperTable
from patchloom.pipelines.reproduce.stages import ReproductionFolder, Stage, table_stages

WITH_FEATURES, WITH_MODEL, WITH_ENCODER = frozenset({"features"}), frozenset({"model"}), frozenset({"autoencoder"})


@dataclass(frozen=True)
class Subject:
    """Something that can be reproduced.

    Args:
        title: what it is called in the paper.
        text: what it shows, in a few words.
        data: the paper's names of its data.
        stages: its commands.
        outcome: what they found, from the folder and a local folder with its cards.
        takes: the options that it takes, of `model`, `autoencoder` and `features`; in small, those in `takes_in_small`.
    """

    title: str
    text: str
    data: list[str]
    stages: Callable[[ReproductionFolder], list[Stage]]
    outcome: Callable[[ReproductionFolder, Path], Outcome]
    takes: frozenset[str] = frozenset()
    takes_in_small: frozenset[str] = frozenset()

    def options(self, small: bool) -> frozenset[str]:
        """The options that it takes."""
        return self.takes_in_small if small else self.takes


def table_subject(table: PaperTable) -> Subject:
    """A table or figure of the paper."""
    encoder = WITH_ENCODER if table.latents else frozenset()
    return Subject(
        table.title, table.subject, table.data, partial(table_stages, table), partial(table_outcome, table),
        takes=encoder | WITH_FEATURES, takes_in_small=encoder if table.small_search else encoder | WITH_FEATURES,
    )  # fmt: skip


SUBJECTS = {name: table_subject(table) for name, table in TABLES.items()} | {
    "samplers": Subject(
        "Table 1's samplers", "quality over network evaluations on one model", [samplers.SAMPLERS_DATA],
        samplers.sampler_stages, samplers.sampler_outcome, WITH_MODEL | WITH_FEATURES, WITH_MODEL | WITH_FEATURES,
    ),
    "controlnet": Subject(
        "Section 4.3", "patches and full images in fine-tuning a ControlNet",
        [controlnet.CONTROL_DATA, controlnet.CAPTIONS],
        controlnet.controlnet_stages, controlnet.controlnet_outcome, WITH_ENCODER, WITH_ENCODER,
    ),
    "efficiency": Subject(
        "Section 4.4", "patches and full images over the number of training images", [efficiency.EFFICIENCY_DATA],
        efficiency.efficiency_stages, efficiency.efficiency_outcome,
    ),
    "speed": Subject(
        "The training speed", "patches and full images after equal time", [speed.SPEED_DATA],
        speed.speed_stages, speed.speed_outcome, WITH_FEATURES, WITH_FEATURES,
    ),
    "extrapolation": Subject(
        "Section 4.5", "larger canvases, around an image and without one", [extrapolation.CANVAS_DATA],
        extrapolation.extrapolation_stages, extrapolation.extrapolation_outcome, WITH_MODEL | WITH_ENCODER, WITH_MODEL,
    ),
}  # fmt: skip
