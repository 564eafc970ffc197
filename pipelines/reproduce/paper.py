"""The paper: what each of its tables and figures compares, on which data, with which results (Wang et al. 2023)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import JsonValue

from patchloom.pipelines.recipes import PAPER
from patchloom.pipelines.tune.frontier import PAPER_FID


@dataclass(frozen=True)
class PaperData:
    """A dataset of the paper.

    Args:
        title: its name in the paper.
        images: about how many it has.
        resolution: side of the images, in pixels.
    """

    title: str
    images: int
    resolution: int


DATA = {
    "celeba": PaperData("CelebA-64x64", 202_599, 64),
    "ffhq": PaperData("FFHQ-64x64", 70_000, 64),
    "bedroom": PaperData("LSUN-Bedroom-256x256", 3_033_042, 256),
    "church": PaperData("LSUN-Church-256x256", 126_227, 256),
    "imagenet": PaperData("ImageNet-256x256", 1_281_167, 256),
    "cat": PaperData("AFHQv2-Cat", 5_000, 64),
    "dog": PaperData("AFHQv2-Dog", 5_000, 64),
    "wild": PaperData("AFHQv2-Wild", 5_000, 64),
}


@dataclass(frozen=True)
class PaperResult:
    """A system of the paper on one dataset, with its results.

    Args:
        data: a key of `DATA`.
        system: its name in the paper.
        recipe: the shipped recipe that trains it.
        settings: recipe keys that distinguish it from the other systems of the table. In small, they choose the
            trials of a search; at full size, those that differ from the recipe are set.
        metrics: what the paper reports, by the names of `patchloom evaluate`.
        time: time of training in the paper; empty where it does not state it.
        guidance: scale of the guidance of its samples.
    """

    data: str
    system: str
    recipe: str
    settings: Mapping[str, JsonValue]
    metrics: Mapping[str, float]
    time: str = ""
    guidance: float = 1.0

    @property
    def slug(self) -> str:
        """A name for folders."""
        return re.sub(r"[^a-z0-9.]+", "-", self.system.lower()).strip("-")


Results = tuple[PaperResult, ...]


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper.

    Args:
        title: what it is called in the paper.
        subject: what it compares, in a few words.
        results: its systems, in its order.
        small_search: the shipped search that compares them in small. Without one, their small twins are trained.
        steps: Heun steps of the samples in the paper.
        churn: churn of these samples, as options of `patchloom sample`.
        latents: whether the systems are trained on latents.
    """

    title: str
    subject: str
    results: Results
    small_search: str = ""
    steps: int = 50
    churn: tuple[str, ...] = field(default=())
    latents: bool = False

    @property
    def data(self) -> list[str]:
        """The names of its data, in order."""
        return list(dict.fromkeys(result.data for result in self.results))


PATCHES: Mapping[str, JsonValue] = {"patches.p": 0.5}
FULL_IMAGES: Mapping[str, JsonValue] = {"patches.p": 1.0}
_HOURS = {0.0: 13.6, 0.1: 20.1, 0.25: 22.5, 0.5: 24.6, 0.75: 42.7, 1.0: 48.5}  # of Figure 2, by p
_FIDS = {system.recipe: system.fid for system in PAPER}
_PDM, _LPDM = ("EDM-DDPM++", "PDM-DDPM++"), ("LDM-ADM", "LPDM-ADM")
_TABLE_1, _TABLE_2, _TABLE_4 = ("about 48 h", "about 24 h"), ("8 days", "4 days"), ("about 18 h", "about 9 h")
_P = tuple(
    PaperResult("celeba", f"p = {p:g}", "celeba64", {"patches.p": p}, {"fid": fid}, f"{_HOURS[p]:g} h")
    for p, fid in PAPER_FID.items()
)


def _pair(data: str, recipes: tuple[str, str], times: tuple[str, str], names: tuple[str, str]) -> Results:
    """A baseline on full images, and the same with patches."""
    settings = (FULL_IMAGES, PATCHES)
    return tuple(
        PaperResult(data, names[one], recipes[one], settings[one], {"fid": float(_FIDS[recipes[one]])}, times[one])
        for one in range(2)
    )


def _schedules(data: str, recipe: str, fids: tuple[float, float]) -> Results:
    """The stochastic and the progressive schedule."""
    return tuple(
        PaperResult(data, name, recipe, {"patches.schedule": name}, {"fid": fid})
        for name, fid in zip(("stochastic", "progressive"), fids, strict=True)
    )


TABLES = {
    "table1": PaperTable(
        "Table 1", "patches and full images on faces",
        _pair("celeba", ("celeba64_edm", "celeba64"), _TABLE_1, _PDM)
        + _pair("ffhq", ("ffhq64_edm", "ffhq64"), _TABLE_1, _PDM),
        "table1_search_cpu",
    ),
    "table2": PaperTable(
        "Table 2", "patches and full images of latents",
        _pair("bedroom", ("lsun_bedroom256_ldm", "lsun_bedroom256"), _TABLE_2, _LPDM)
        + _pair("church", ("lsun_church256_ldm", "lsun_church256"), _TABLE_2, _LPDM),
        "table2_search_cpu", latents=True,
    ),
    "table3": PaperTable(
        "Table 3", "latents with classes and guidance",
        (
            PaperResult("imagenet", "LPDM-ADM", "imagenet256", PATCHES,
                        {"fid": 7.64, "sfid": 5.36, "inception_score": 130.23, "precision": 0.73, "recall": 0.63}),
            PaperResult("imagenet", "LPDM-ADM, guidance 1.3", "imagenet256", PATCHES,
                        {"fid": 2.72, "sfid": 4.86, "inception_score": 243.25, "precision": 0.84, "recall": 0.57},
                        guidance=1.3),
        ),
        steps=256, churn=("--churn", "40", "--churn-between", "0.05-50", "--churn-noise", "1.003"), latents=True,
    ),
    "table4": PaperTable(
        "Table 4", "patches and full images of small datasets",
        _pair("cat", ("afhq64_cat_edm", "afhq64_cat"), _TABLE_4, _PDM)
        + _pair("dog", ("afhq64_dog_edm", "afhq64_dog"), _TABLE_4, _PDM)
        + _pair("wild", ("afhq64_wild_edm", "afhq64_wild"), _TABLE_4, _PDM),
        "table4_search_cpu",
    ),
    "figure2": PaperTable("Figure 2", "FID and cost over p", _P, "figure2_search_cpu"),
    "figure3": PaperTable("Figure 3", "samples of the same seeds over p", _P, "figure2_search_cpu"),
    "schedule": PaperTable(
        "Section 4.1", "stochastic and progressive schedules",
        _schedules("celeba", "celeba64", (1.66, 2.05)) + _schedules("ffhq", "ffhq64", (3.11, 3.85)),
        "schedule_search_cpu",
    ),
}  # fmt: skip
