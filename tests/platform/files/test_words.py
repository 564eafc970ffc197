"""Words and paths: options that take either, and texts that are numbers only to `str.isdigit`."""

from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.pipelines.cli.training import _whole_numbers
from patchloom.pipelines.evaluate.features import load_features
from patchloom.pipelines.sample.seeds import parse_seeds
from patchloom.platform.files.storage import existing_file, local_path, whole_number
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.recipe.search import load_search
from patchloom.platform.tracking.registry import fetch_model

LONG = "n" * 300


def test_long_list_of_seeds_is_no_path() -> None:
    text = ",".join(str(seed) for seed in range(0, 162, 2))
    assert len(text) > 255 and list(parse_seeds(text)) == list(range(0, 162, 2))


@pytest.mark.parametrize("text", ["²", "1-²", "٣", "-1", "1-", "", "x", "a\0b", LONG, "9" * 5000, str(2**63)])
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_seeds(text)
    assert "--seeds" in str(refused.value) and len(str(refused.value)) < 400


def test_range_that_is_too_large_is_refused_before_it_is_built() -> None:
    with pytest.raises(UserError, match=str(2**64)):
        parse_seeds(f"0-{2**64}")


@pytest.mark.parametrize("work", [load_recipe, load_search, load_features, fetch_model, local_path])
@pytest.mark.parametrize("text", [LONG, "a\0b"])
def test_word_that_cannot_be_a_path_is_one_line(work: object, text: str) -> None:
    with pytest.raises(UserError) as refused:
        work(text)  # type: ignore[operator]
    assert "\n" not in str(refused.value)


def test_superscript_is_no_width() -> None:
    assert _whole_numbers("16, 32") == (16, 32)
    with pytest.raises(UserError):
        _whole_numbers("16,²")


def test_helpers(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    assert existing_file(str(tmp_path / "f")) == tmp_path / "f"
    assert existing_file(str(tmp_path)) is None and existing_file(LONG) is None and existing_file("a\0b") is None
    assert whole_number("007") == 7 and whole_number("²") is None and whole_number("-1") is None
    assert local_path("é" * 127) == Path.cwd() / ("é" * 127)  # 254 bytes
