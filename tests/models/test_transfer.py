"""Weights go over level by level; what a source has not learned is left fresh, and all else is refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchloom.models.denoiser import Denoiser
from patchloom.models.patches import coordinate_grid
from patchloom.models.transfer import transfer

Build = Callable[..., Denoiser]
NOISY = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WHERE = coordinate_grid(16, 16)[None].expand(2, -1, -1, -1)


def options(**changes: Any) -> dict[str, Any]:
    return {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0, **changes}


@torch.no_grad()
@pytest.mark.parametrize("network", ["song", "dhariwal"])
def test_the_same_network_is_the_same_function(tiny_denoiser: Build, network: str) -> None:
    source, target = (tiny_denoiser(seed, network=network) for seed in (1, 2))
    assert transfer(target, source) == []
    assert torch.equal(target(NOISY, 0.5, WHERE), source(NOISY, 0.5, WHERE))


@torch.no_grad()
@pytest.mark.parametrize(("before", "after"), [(3, 5), (0, 5), (3, 0)])
def test_other_classes_leave_their_embedding_fresh(tiny_denoiser: Build, before: int, after: int) -> None:
    source, target = tiny_denoiser(1, classes=before), tiny_denoiser(2, classes=after)
    fresh = {name: tensor.clone() for name, tensor in target.state_dict().items() if "map_label" in name}
    left = transfer(target, source)
    assert "model.map_label.weight" in left if after else not left
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name in left else source.state_dict()[name])


@torch.no_grad()
def test_another_resolution_is_the_same_function_of_a_patch(tiny_denoiser: Build) -> None:
    source = tiny_denoiser(1)
    target = tiny_denoiser(2, resolution=32, network_options=options(attention=[16]))
    assert transfer(target, source) == []
    assert torch.equal(target(NOISY, 0.5, WHERE), source(NOISY, 0.5, WHERE))


@torch.no_grad()
def test_a_source_without_coordinates_starts_a_network_that_does_not_hear_them_yet(tiny_denoiser: Build) -> None:
    source, target = tiny_denoiser(1, coordinates="none"), tiny_denoiser(2)
    (left,) = transfer(target, source)
    assert "coordinates" in left
    torch.testing.assert_close(target(NOISY, 0.5, WHERE), source(NOISY, 0.5))
    torch.testing.assert_close(target(NOISY, 0.5, WHERE), target(NOISY, 0.5, -WHERE))


@pytest.mark.parametrize(
    "changes",
    [
        {"network_options": options(width=16)},
        {"network_options": options(blocks=2)},
        {"network_options": options(attention=[])},
        {"network": "dhariwal"},
        {"channels": 4},
    ],
    ids=["width", "blocks", "attention", "network", "channels"],
)
def test_any_other_difference_is_refused_by_name(tiny_denoiser: Build, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.\S+ is (\d+( x \d+)*|none|missing)\b"):
        transfer(tiny_denoiser(2, **changes), tiny_denoiser(1))
