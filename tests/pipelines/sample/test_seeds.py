"""Seeds as ranges agree with plain sets of numbers, and classes of seeds with plain dictionaries."""

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchloom.errors import UserError
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.sampling_options import SamplingOptions
from patchloom.pipelines.sample.options import parse_levels, parse_size
from patchloom.pipelines.sample.seeds import SeedList, Seeds, choose_labels, listed_seeds, parse_seeds

LARGEST = 2**63 - 1


def some_numbers(seed: int) -> list[int]:
    """Different numbers, some of them consecutive."""
    draw = random.Random(seed)
    return sorted({number + step for number in draw.sample(range(300), 40) for step in range(draw.randint(1, 9))})


@pytest.mark.parametrize("seed", range(8))
def test_ranges_agree_with_sets(seed: int) -> None:
    numbers, others = some_numbers(seed), some_numbers(seed + 100)
    found, removed = listed_seeds(reversed(numbers)), listed_seeds(others)
    assert list(found) == found.numbers().tolist() == numbers and len(found) == len(numbers)
    assert len(found.firsts) == sum(number - 1 not in numbers for number in numbers)
    assert list(found.without(removed)) == sorted(set(numbers) - set(others))
    assert list(found.without(found)) == [] and list(found.without(Seeds())) == numbers
    asked = np.arange(-1, 320)
    wanted = [numbers.index(number) if number in numbers else -1 for number in asked.tolist()]
    assert found.positions(asked).tolist() == wanted
    assert [list(part) for part in found.in_parts(7)] == [numbers[at : at + 7] for at in range(0, len(numbers), 7)]
    by_archive = {number: list(part) for number, part in found.by_archive(16)}
    assert by_archive == {
        number: inside for number in range(20) if (inside := [one for one in numbers if one // 16 == number])
    }
    one_by_one = SeedList()
    for number in numbers:
        one_by_one.add(number)
    assert list(one_by_one.seeds().ranges()) == list(found.ranges())


def test_a_billion_seeds_are_one_range() -> None:
    seeds = parse_seeds("5-7,0-999999999,3")
    assert len(seeds) == 10**9 and list(seeds.ranges()) == [(0, 10**9 - 1)]
    rest = seeds.without(Seeds([0, 500], [250, 999_999_000]))
    assert list(rest.ranges()) == [(251, 499), (999_999_001, 999_999_999)]
    assert len(pickle.dumps(seeds)) < 1000


@pytest.mark.parametrize("text", ["0-999999999999", f"0-{LARGEST}", "0-999999999,5000000000", f"5,0-{LARGEST},3-9"])
def test_more_seeds_than_a_folder_can_have_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="1,000,000,000"):
        parse_seeds(text)


@pytest.mark.parametrize("seeds", [[-1], [2**63], [1.5], [1.0], ["1"], [None], np.array([1.5])], ids=repr)
def test_what_is_no_seed_in_python_is_refused(seeds: Any) -> None:
    with pytest.raises(UserError, match=r"^seeds: "):
        listed_seeds(seeds)
    assert list(listed_seeds(range(2, 5))) == list(listed_seeds(np.array([4, 3, 2]))) == [2, 3, 4]


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", 100_001), ("churn", 1e5), ("churn", float("nan")), ("churn_noise", 101), ("guidance", 101.0),
     ("guidance", -101.0), ("guidance", float("nan")), ("size", (10_000, 10_000))],
)  # fmt: skip
def test_options_have_bounds(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        SamplingOptions(**{name: value})


@pytest.mark.parametrize("text", ["²x2", "9" * 5000 + "x1", "1x", "0.5x2", "٣x٣"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="HxW"):
        parse_size(text)
    with pytest.raises(UserError, match="LOW-HIGH"):
        parse_levels("²-5", "--guidance-between")


def test_file_of_seeds_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a seed"):
        parse_seeds(str(tmp_path / "noise.txt"))


def test_the_largest_seeds() -> None:
    seeds = parse_seeds(f"{LARGEST - 1}-{LARGEST},0")
    assert list(seeds) == [0, LARGEST - 1, LARGEST]
    assert [(number, list(part)) for number, part in seeds.by_archive(1000)] == [
        (0, [0]), (LARGEST // 1000, [LARGEST - 1, LARGEST]),
    ]  # fmt: skip
    for wrong in ([LARGEST + 1], [-1]):
        with pytest.raises(UserError, match="seeds"):
            listed_seeds(wrong)


def a_card(**values: object) -> ModelCard:
    config = DenoiserConfig(network="song", network_options={}, resolution=8, channels=3, classes=3, coordinates=True,
                            sigma_data=0.5)  # fmt: skip
    return ModelCard(denoiser=config, normalisation=pixel_normalisation(), class_names=["a", "b", "c"], **values)


def test_classes_take_turns_without_those_that_have_no_images() -> None:
    seeds = Seeds([0, 10], [3, 11])
    classes, kind, label = choose_labels(seeds, a_card(empty_classes=[1]), None, None)
    assert classes.of(seeds.numbers()).tolist() == [0, 2, 0, 2, 0, 2] and (kind, label) == ("balanced", None)
    classes, kind, label = choose_labels(seeds, a_card(), "b", None)
    assert classes.of(seeds.numbers()).tolist() == [1] * 6 and (kind, label) == ("fixed", 1)


def test_classes_of_a_file_travel_with_their_seeds(tmp_path: Path) -> None:
    table = {seed: seed * 7 % 3 for seed in range(100)}
    lines = [json.dumps({"seed": seed, "label": label}) for seed, label in reversed(table.items())]
    (tmp_path / "classes.jsonl").write_text("\n".join([*lines, lines[0], '{"seed": "x", "label": 1}']))
    seeds = Seeds([50, 2], [59, 3])
    classes, *_ = choose_labels(seeds, a_card(), None, str(tmp_path / "classes.jsonl"))
    assert classes.of(seeds.numbers()).tolist() == [table[seed] for seed in seeds]
    part = classes.within(Seeds([55], [57]))
    assert part.numbers is not None and part.numbers.tolist() == [table[seed] for seed in (55, 56, 57)]
    assert part.of(np.array([57, 55])).tolist() == [table[57], table[55]]
    (tmp_path / "classes.jsonl").write_text("\n".join([*lines, '{"seed": 55, "label": 2}']))
    with pytest.raises(UserError, match=r"two labels for 55, 1 and 2"):
        choose_labels(seeds, a_card(), None, str(tmp_path / "classes.jsonl"))
