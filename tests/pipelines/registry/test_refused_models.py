"""Models that do not fit a command are refused before any sampling, with what was found instead."""

from dataclasses import replace
from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.models.checkpoints import read_card
from patchloom.pipelines.registry.comparing import _check_one_size, _different_images
from patchloom.platform.tracking.registry import fetch_model


@pytest.mark.parametrize("card", ["dataset.json", "sampling.json", "search.json", "run.json"])
def test_folder_that_is_no_model_is_named(tmp_path: Path, card: str) -> None:
    (tmp_path / card).write_text("{}")
    with pytest.raises(UserError) as refused:
        fetch_model(str(tmp_path))
    assert (str(tmp_path) in str(refused.value) and "`patchloom" in str(refused.value)) or card == "search.json"


def test_models_of_different_sizes_are_refused_and_listed(trained: Path) -> None:
    card = read_card(trained / "model")
    larger = replace(card, denoiser=replace(card.denoiser, resolution=64))
    assert _different_images(card, card) == {}
    assert _different_images(card, larger) == {"image_side": (16, 64)}
    _check_one_size(card, card)
    with pytest.raises(UserError) as refused:
        _check_one_size(card, larger)
    assert "16x16" in str(refused.value) and "64x64" in str(refused.value)
