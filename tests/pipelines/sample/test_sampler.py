"""The Sampler of Ray Data pipelines gives the images of `patchloom sample`."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data
from PIL import Image

from patchloom.errors import UserError
from patchloom.pipelines.sample import sample
from patchloom.pipelines.sample.formats import FORMATS
from patchloom.pipelines.sample.options import FORMAT_NAMES, SampleOptions
from patchloom.pipelines.sample.sampler import Sampler

pytestmark = pytest.mark.ray
OPTIONS: dict[str, Any] = {"steps": 3, "batch": 4, "guidance": 1.5}


@pytest.fixture(scope="module")
def pngs(champion: str, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """(10, H, W, C): seeds 0 to 9 of `patchloom sample`."""
    folder = tmp_path_factory.mktemp("samples") / "png"
    sample(champion, str(folder), "0-9", workers=0, **OPTIONS)
    return np.stack([np.asarray(Image.open(folder / "000000" / f"{seed:06d}.png")) for seed in range(10)])


@pytest.fixture(scope="module")
def sampler(champion: str) -> Sampler:
    return Sampler(champion, **OPTIONS)


@pytest.mark.parametrize("seeds", [[], [3], [9, 0, 4], list(range(10))])
def test_images_do_not_depend_on_the_size_of_the_batch(seeds: list[int], sampler: Sampler, pngs: np.ndarray) -> None:
    rows = sampler({"seed": np.array(seeds, np.int64), "note": np.array(["kept"] * len(seeds))})
    assert rows["image"].dtype == np.uint8 and (rows["image"] == pngs[seeds]).all()
    assert rows["seed"].tolist() == seeds and rows["note"].tolist() == ["kept"] * len(seeds)


@pytest.mark.parametrize(
    "labels",
    [np.array(["chelsea", "coffee", None], dtype=object), np.array([0, 1, 0]), np.array([0.0, np.nan, np.nan])],
    ids=["names", "numbers", "missing"],
)
def test_labels_by_name_or_number(labels: np.ndarray, sampler: Sampler, pngs: np.ndarray) -> None:
    assert (sampler({"seed": np.arange(3), "label": labels})["image"] == pngs[:3]).all()


def test_ray_data_gives_the_images_of_patchloom_sample(champion: str, pngs: np.ndarray) -> None:
    rows = ray.data.from_items([{"seed": seed, "name": f"row {seed}"} for seed in range(10)]).map_batches(
        Sampler, fn_constructor_args=(champion,), fn_constructor_kwargs=OPTIONS, batch_size=3,
        compute=ray.data.ActorPoolStrategy(size=1),
    )  # fmt: skip
    for row in rows.take_all():
        assert (row["image"] == pngs[row["seed"]]).all() and row["name"] == f"row {row['seed']}"


@pytest.mark.parametrize(
    ("options", "rows", "named"),
    [
        ({"sampler": "magic"}, {}, r"sampler.*magic"),
        ({"size": (17, 16)}, {}, r"multiples of 2"),
        ({"on_error": "drop"}, {}, r"on_error.*drop.*raise, column"),
        ({}, {"seed": np.array([0, 7]), "label": np.array(["coffee", "tea"])}, r"^seed 7.*tea.*chelsea, coffee$"),
        ({}, {"seed": np.array([0.5])}, r"0\.5"),
        ({}, {"seed": np.array([0, None])}, r"None"),
        ({}, {"seed": np.array([-1])}, r"-1"),
        ({}, {"number": np.array([0])}, r"seed.*number"),
    ],
)
def test_wrong_options_and_rows_are_user_errors(
    options: dict[str, Any], rows: dict[str, np.ndarray], named: str, champion: str
) -> None:
    with pytest.raises(UserError, match=named):
        Sampler(champion, **options)(rows)


def test_wrong_rows_are_marked_and_others_keep_their_bytes(champion: str, pngs: np.ndarray) -> None:
    seeds = np.array([4, 1, np.nan, 3, 2**65, 2])
    labels = np.array([None, "tea", None, ["chelsea"], None, 0], dtype=object)
    rows = Sampler(champion, **OPTIONS, on_error="column")({"seed": seeds, "label": labels})
    assert [bool(error) for error in rows["error"]] == [False, True, True, True, True, False]
    assert all(shown in rows["error"][1] for shown in ("seed 1", "tea", "chelsea, coffee"))
    assert "nan" in rows["error"][2] and str(2**65) in rows["error"][4]
    assert (rows["image"][[0, 5]] == pngs[[4, 2]]).all() and not rows["image"][1:5].any()
    assert rows["image"].shape == (6, *pngs.shape[1:]) and rows["label"] is labels


def test_signatures_show_the_options() -> None:
    shown = inspect.signature(sample).parameters
    assert {"model", "out", "seeds", "workers", "resources", *SampleOptions.__dataclass_fields__} == shown.keys()
    assert shown["steps"].default == 18 and shown["guidance"].default == 1.0
    assert inspect.signature(Sampler).parameters["batch"].default == 8
    assert inspect.signature(Sampler).parameters["on_error"].default == "raise"
    assert not {"out", "format", "labels"} & inspect.signature(Sampler).parameters.keys()


def test_every_format_is_an_option() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES


def test_unknown_options_are_a_type_error(champion: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="speed"):
        sample(champion, str(tmp_path), speed=3)
    with pytest.raises(TypeError, match="speed"):
        Sampler(champion, speed=3)
