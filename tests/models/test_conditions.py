"""What a network is told beside the noisy image: where it lies, how large its patch is, how it was augmented."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patchloom.models.augment import augmentation_labels
from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_denoiser, halvings_of
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import coordinate_grid, encode_coordinates, extended_grid, patch_schedule
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepPlan, StepSettings

Build = Callable[..., Denoiser]
WIDTHS: dict[str, Any] = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
STEM = {"linear": [], "periodic": [], "none": [], "implicit": [8, 12]}
CHANNELS = {"linear": 5, "periodic": 3 + 24, "none": 3, "implicit": 5}  # of 3 of the image's


def patches(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))


def full_grid(size: int) -> Tensor:
    return coordinate_grid(size, size)[None].expand(2, -1, -1, -1)


def largest_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# Encodings


def test_linear_coordinates_are_themselves() -> None:
    coordinates = full_grid(8)
    assert torch.equal(encode_coordinates(coordinates, "linear"), coordinates)


def test_periodic_coordinates_are_sines_and_cosines_of_six_octaves() -> None:
    coordinates = torch.rand(3, 2, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = encode_coordinates(coordinates, "periodic").numpy()
    assert found.shape == (3, 24, 5, 7)
    x = coordinates.double().numpy()
    angles = [2.0**k * x[:, axis] for k in range(6) for axis in (0, 1)]
    wanted = np.stack([np.sin(angle) for angle in angles] + [np.cos(angle) for angle in angles], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_periodic_coordinates_keep_the_ends_of_the_image_and_all_pixels_apart() -> None:
    grid = encode_coordinates(coordinate_grid(64, 64)[None], "periodic")[0]
    rows, columns = grid[:, :, 0].T, grid[:, 0].T
    for line in (rows, columns):
        distances = torch.cdist(line, line) + torch.eye(64) * 9
        assert distances.min() > 0.1
        assert distances[0, -1] > 1


def test_an_unknown_encoding_is_refused(tiny_config: Callable[..., DenoiserConfig]) -> None:
    with pytest.raises(ValueError, match=r"spiral.*linear.*periodic"):
        encode_coordinates(full_grid(4), "spiral")
    with pytest.raises(ValueError, match=r"spiral.*none, linear, implicit, periodic"):
        build_denoiser(tiny_config(coordinates="spiral"))


# Grids beyond the image


@pytest.mark.parametrize(("height", "width", "resolution"), [(16, 16, 16), (24, 32, 16), (17, 33, 15), (20, 16, 8)])
def test_the_middle_of_a_larger_canvas_is_the_image(height: int, width: int, resolution: int) -> None:
    grid = extended_grid(height, width, resolution)
    assert grid.shape == (2, height, width) and grid.dtype == torch.float32
    top, left = (height - resolution) // 2, (width - resolution) // 2
    middle = grid[:, top : top + resolution, left : left + resolution]
    torch.testing.assert_close(middle, coordinate_grid(resolution, resolution), rtol=0, atol=1e-6)


def test_a_larger_canvas_keeps_the_spacing_of_coordinates() -> None:
    grid = extended_grid(24, 32, 16)
    torch.testing.assert_close(grid[0].diff(dim=1), torch.full((24, 31), 2 / 15), rtol=0, atol=1e-5)
    torch.testing.assert_close(grid[1].diff(dim=0), torch.full((23, 32), 2 / 15), rtol=0, atol=1e-5)
    assert not grid[0].diff(dim=0).any() and not grid[1].diff(dim=1).any()
    assert (grid[0, :, :8] < -1.1).all() and (grid[0, :, -8:] > 1.1).all()
    torch.testing.assert_close(grid, -grid.flip(1, 2), rtol=0, atol=1e-6)  # the same on both sides


def test_a_canvas_with_an_odd_margin_lies_half_a_pixel_off() -> None:
    grid = extended_grid(16, 17, 16)
    assert grid[0, 0, 8] == 0
    assert grid[0, 0, 0] == pytest.approx(-16 / 15)


# Coordinates in the network


@pytest.mark.parametrize("encoding", list(STEM))
@pytest.mark.parametrize("network", ["song", "dhariwal"])
def test_the_first_layer_reads_the_image_and_the_coordinates(tiny_denoiser: Build, network: str, encoding: str) -> None:
    options = {**WIDTHS, "stem": STEM[encoding]}
    denoiser = tiny_denoiser(network=network, network_options=options, coordinates=encoding)
    first = denoiser.model.get_submodule("enc").get_submodule("16x16_conv")
    if encoding == "implicit":
        assert isinstance(first, nn.Sequential)
        shapes = [tuple(layer.weight.shape) for layer in first if not isinstance(layer, nn.SiLU)]
        assert shapes == [(8, 5, 1, 1), (12, 8, 1, 1), (8, 12, 3, 3)]
    else:
        weight = first.get_parameter("weight")
        assert tuple(weight.shape) == (8, CHANNELS[encoding], 3, 3)


@pytest.mark.parametrize("encoding", ["linear", "periodic", "implicit"])
@pytest.mark.parametrize("network", ["song", "dhariwal"])
@torch.no_grad()
def test_every_encoding_tells_patches_of_any_size_where_they_lie(
    tiny_denoiser: Build, network: str, encoding: str
) -> None:
    options = {**WIDTHS, "stem": STEM[encoding]}
    denoiser = tiny_denoiser(network=network, network_options=options, coordinates=encoding)
    for size in (16, 8, 4):
        here, there = full_grid(16)[..., :size, :size], full_grid(16)[..., -size:, -size:]
        one, other = (denoiser(patches(size), 0.5, where) for where in (here, there))
        assert one.shape == (2, 3, size, size) and one.isfinite().all()
        assert torch.equal(one, denoiser(patches(size), 0.5, here))
        if size < 16:
            assert largest_difference(one, other) > 1e-4
        whole = denoiser(patches(size), 0.5)
        torch.testing.assert_close(whole, denoiser(patches(size), 0.5, full_grid(size)))


@pytest.mark.parametrize("network", ["song", "dhariwal"])
@torch.no_grad()
def test_a_network_without_coordinates_runs_at_any_size_and_refuses_them(tiny_denoiser: Build, network: str) -> None:
    denoiser = tiny_denoiser(network=network, network_options=WIDTHS, coordinates="none")
    for size in (16, 8, 4):
        assert denoiser(patches(size), 0.5).shape == (2, 3, size, size)
        with pytest.raises(ValueError, match="coordinates"):
            denoiser(patches(size), 0.5, full_grid(size))


@torch.no_grad()
def test_a_stem_of_1x1_convolutions_mixes_coordinates_in_before_any_neighbour(tiny_denoiser: Build) -> None:
    denoiser = tiny_denoiser(network_options={**WIDTHS, "stem": [8, 12]}, coordinates="implicit")
    first = denoiser.model.get_submodule("enc").get_submodule("16x16_conv")
    assert isinstance(first, nn.Sequential)
    x = torch.randn(1, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[0, 3, 5, 9] += 1.0
    moved = (first[:-1](x) != first[:-1](changed)).any(1)[0]
    assert moved.nonzero().tolist() == [[5, 9]]


@pytest.mark.parametrize(("flag", "encoding"), [(True, "linear"), (False, "none")])
def test_true_and_false_of_older_models_are_encodings(
    tiny_config: Callable[..., DenoiserConfig], flag: bool, encoding: str
) -> None:
    assert build_denoiser(tiny_config(coordinates=flag)).coordinates == encoding


# The patch's size


def fractions_told(denoiser: Denoiser) -> list[list[float] | None]:
    """Filled with the patch fraction that each later call of the network is given."""
    told: list[list[float] | None] = []

    def record(_: nn.Module, __: tuple[Any, ...], given: dict[str, Any]) -> None:
        told.append(given["patch_fraction"].tolist() if "patch_fraction" in given else None)

    denoiser.model.register_forward_pre_hook(record, with_kwargs=True)
    return told


@torch.no_grad()
def test_the_patch_size_condition_is_the_side_over_the_image_side(tiny_denoiser: Build) -> None:
    denoiser = tiny_denoiser(patch_size=True)
    told = fractions_told(denoiser)
    for size in (4, 8, 12, 16, 32):
        denoiser(patches(size), 0.5, full_grid(size))
    assert told == [[0.25] * 2, [0.5] * 2, [0.75] * 2, [1.0] * 2, [1.0] * 2]


@torch.no_grad()
def test_an_input_without_coordinates_of_its_own_is_a_whole_image(tiny_denoiser: Build) -> None:
    denoiser = tiny_denoiser(patch_size=True)
    told = fractions_told(denoiser)
    for size in (4, 16, 32):
        denoiser(patches(size), 0.5)
    assert told == [[1.0] * 2] * 3


@torch.no_grad()
def test_a_network_without_coordinates_also_gets_the_patch_size(tiny_denoiser: Build) -> None:
    denoiser = tiny_denoiser(patch_size=True, coordinates="none")
    told = fractions_told(denoiser)
    for size in (4, 8, 16):  # training gives such a network no coordinates, and only the size tells
        denoiser(patches(size), 0.5)
    assert told == [[0.25] * 2, [0.5] * 2, [1.0] * 2]


@torch.no_grad()
def test_a_network_without_the_condition_does_not_get_the_patch_size(tiny_denoiser: Build) -> None:
    denoiser = tiny_denoiser()
    told = fractions_told(denoiser)
    denoiser(patches(8), 0.5, full_grid(8))
    assert told == [None]


@pytest.mark.parametrize("network", ["song", "dhariwal"])
@pytest.mark.parametrize("condition", [True, False])
@torch.no_grad()
def test_the_same_patch_of_a_larger_image_is_denoised_otherwise_only_with_the_condition(
    tiny_denoiser: Build, network: str, condition: bool
) -> None:
    denoiser = tiny_denoiser(network=network, network_options=WIDTHS, patch_size=condition)
    found = []
    for resolution in (8, 16, 32):  # the same weights and the same coordinates
        denoiser.resolution = resolution
        found.append(denoiser(patches(8), 0.5, full_grid(8)))
    for other in found[1:]:
        assert (largest_difference(found[0], other) > 1e-4) == condition
    torch.testing.assert_close(denoiser(patches(8), 0.5), found[0])  # a whole image again
    assert ("map_size.weight" in denoiser.model.state_dict()) == condition


# Augmentation labels


@pytest.mark.parametrize("network", ["song", "dhariwal"])
@torch.no_grad()
def test_a_network_with_augmentation_labels_reads_them_and_zeros_are_none(tiny_denoiser: Build, network: str) -> None:
    denoiser = tiny_denoiser(network=network, network_options={**WIDTHS, "augmentation": 9})
    weight = denoiser.model.get_submodule("map_augment").get_parameter("weight")
    assert tuple(weight.shape) == (8, 9)
    x = patches(16)
    plain = denoiser(x, 0.5)
    assert torch.equal(denoiser(x, 0.5, augmentation=torch.zeros(2, 9)), plain)
    for column in range(9):
        labels = torch.zeros(2, 9)
        labels[1, column] = 1.0
        told = denoiser(x, 0.5, augmentation=labels)
        torch.testing.assert_close(told[0], plain[0])
        assert largest_difference(told[1], plain[1]) > 1e-5
    turned = augmentation_labels(torch.zeros(2, 8).index_fill(1, torch.tensor([3]), 0.5))
    assert not torch.equal(denoiser(x, 0.5, augmentation=turned), plain)


@torch.no_grad()
def test_a_network_without_augmentation_labels_has_no_weights_for_them(tiny_denoiser: Build) -> None:
    denoiser = tiny_denoiser()
    assert not [name for name in denoiser.state_dict() if "augment" in name]


@torch.no_grad()
def test_all_conditions_work_together(tiny_denoiser: Build) -> None:
    options = {**WIDTHS, "stem": [8], "augmentation": 9}
    denoiser = tiny_denoiser(network_options=options, coordinates="implicit", patch_size=True, classes=3)
    x, where = patches(8), full_grid(16)[..., 4:12, 4:12]
    plain = denoiser(x, 0.5, where, torch.eye(3)[:2], augmentation=torch.zeros(2, 9))
    changes: list[dict[str, Any]] = [
        {"where": where + 0.1}, {"labels": torch.eye(3)[1:]}, {"augmentation": torch.ones(2, 9)}, {"sigma": 0.6},
    ]  # fmt: skip
    for change in changes:
        found = denoiser(
            x, change.get("sigma", 0.5), change.get("where", where), change.get("labels", torch.eye(3)[:2]),
            augmentation=change.get("augmentation"),
        )  # fmt: skip
        assert largest_difference(found, plain) > 1e-5
    denoiser.resolution = 32
    assert largest_difference(denoiser(x, 0.5, where, torch.eye(3)[:2]), plain) > 1e-5


@pytest.mark.parametrize("network", ["song", "dhariwal"])
@pytest.mark.parametrize("coordinates", ["linear", "none"])
def test_a_training_step_reaches_the_weights_of_every_condition(
    tiny_denoiser: Build, network: str, coordinates: str
) -> None:
    options = {**WIDTHS, "augmentation": 9}
    denoiser = tiny_denoiser(network=network, network_options=options, patch_size=True, coordinates=coordinates)
    schedule = patch_schedule(16, 0.5)
    method = StepSettings(
        seed=0, schedule=schedule, updates=1, batch_size=4, block_size=4, lr=1e-3, lr_rampup_images=0, augmentation=0.9
    )
    state = new_state(denoiser.train(), [], method, (0.9, 0.999), 1e-8)
    told = fractions_told(denoiser)
    images = torch.randint(0, 256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    plan = StepPlan(0, 0, 4, (schedule.sizes[1],), (2,))
    rows = StoredRows(images, torch.full((8,), -1))
    training_step(state, method, plan, zip(plan.share(), [rows], strict=True), pixel_normalisation(), None)
    for name in ("map_augment", "map_size"):
        gradient = denoiser.model.get_parameter(f"{name}.weight").grad
        assert gradient is not None and gradient.abs().max() > 0
    assert told == [[0.5] * 8]


# Channels and sides


@pytest.mark.parametrize("channels", [1, 3, 4, 32])
@pytest.mark.parametrize("network", ["song", "dhariwal"])
@torch.no_grad()
def test_any_number_of_image_channels_works(tiny_denoiser: Build, network: str, channels: int) -> None:
    denoiser = tiny_denoiser(network=network, network_options=WIDTHS, channels=channels)
    for size in (16, 8):
        found = denoiser(patches(size, channels), 0.5)
        assert found.shape == (2, channels, size, size)
        assert found.isfinite().all()
    last = found[:, -1]
    changed = patches(8, channels)
    changed[:, 0] += 1.0
    assert largest_difference(denoiser(changed, 0.5)[:, -1], last) > 1e-5  # every channel sees every other


@pytest.mark.parametrize("resolution", [24, 40])
@pytest.mark.parametrize("network", ["song", "dhariwal"])
@torch.no_grad()
def test_a_resolution_need_only_be_divisible(tiny_denoiser: Build, network: str, resolution: int) -> None:
    options = {**WIDTHS, "width_multipliers": [1, 2, 2], "attention": [resolution // 2]}
    options |= {"head_width": 8} if network == "dhariwal" else {}  # levels narrower than a head do not attend
    denoiser = tiny_denoiser(network=network, network_options=options, resolution=resolution)
    attending = {name for name, layer in denoiser.model.named_modules() if hasattr(layer, "qkv")}
    assert any(f"{resolution // 2}x{resolution // 2}_block0" in name for name in attending)
    for height, width in ((resolution, resolution), (resolution // 2, resolution // 2), (4, 4), (12, 20)):
        x = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
        found = denoiser(x, 0.5)
        assert found.shape == x.shape and found.isfinite().all()
    for height, width in ((resolution - 2, resolution), (resolution, resolution + 1), (2, 2)):
        with pytest.raises(ValueError, match=rf"{height} x {width} pixels .* multiples of 4"):
            denoiser(torch.zeros(1, 3, height, width), 0.5)


@pytest.mark.parametrize(("resolution", "levels", "multiple"), [(18, 3, 4), (15, 2, 2), (20, 4, 8), (2, 3, 4)])
@pytest.mark.parametrize("network", ["song", "dhariwal"])
def test_a_resolution_that_cannot_be_halved_is_refused_when_it_is_built(
    tiny_config: Callable[..., DenoiserConfig], network: str, resolution: int, levels: int, multiple: int
) -> None:
    config = tiny_config(
        network=network, resolution=resolution, network_options={**WIDTHS, "width_multipliers": [1] * levels}
    )
    with pytest.raises(ValueError, match=rf"halved {levels - 1} times: .* multiples of {multiple}\b"):
        build_denoiser(config)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_halvings_of_a_network_are_counted(tiny_config: Callable[..., DenoiserConfig], levels: int) -> None:
    options = {**WIDTHS, "width_multipliers": [1] * levels}
    assert halvings_of(tiny_config(network_options=options)) == levels - 1
