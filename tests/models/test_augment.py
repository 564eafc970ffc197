"""Augmentation moves images and their coordinates together, as its labels say, and changes no other draw."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from patchloom.models.augment import augment, augmentation_labels, augmentation_parameters
from patchloom.models.normalisation import Normalisation
from patchloom.models.patches import coordinate_grid, crop, patch_schedule
from patchloom.models.random_draws import CropBatch, Draws, RandomDraws
from patchloom.models.step import StepSettings, StoredRows, crop_losses

R = 33  # odd, so that a pixel lies in the middle
PIXEL = 2 / (R - 1)
CPU = torch.device("cpu")


def parameters(**changes: float) -> Tensor:
    """One image's a0 ... a7, all 0 but those named."""
    values = torch.zeros(1, 8)
    for name, value in changes.items():
        values[0, int(name[1:])] = value
    return values


def random_images(count: int = 1, side: int = R) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 255


def draw_parameters(count: int, probability: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    uniforms, normals = torch.rand(count, 10, generator=generator), torch.randn(count, 4, generator=generator)
    return augmentation_parameters(uniforms, normals, probability)


def draws_of_block(step: int, block: int, size: int, latent: bool = False, augmentation: float = 0.0) -> RandomDraws:
    return Draws(1).crops(CropBatch(step, range(block, block + 1), 8, 3, 16, size, latent, CPU, augmentation))


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    return draw_parameters(50_000, 0.12, seed=1).double().numpy()


# Parameters and labels


def test_the_horizontal_flip_is_always_a_fair_coin(drawn: np.ndarray) -> None:
    assert set(drawn[:, 0]) == {0.0, 1.0}
    assert stats.binomtest(int(drawn[:, 0].sum()), 50_000, 0.5).pvalue > 1e-4


def test_the_vertical_flip_is_a_fair_coin_that_is_thrown_with_the_probability(drawn: np.ndarray) -> None:
    assert set(drawn[:, 1]) == {0.0, 1.0}
    assert stats.binomtest(int(drawn[:, 1].sum()), 50_000, 0.06).pvalue > 1e-4


@pytest.mark.parametrize("column", [2, 3, 5, 6, 7])
def test_every_other_transformation_is_used_with_the_probability(drawn: np.ndarray, column: int) -> None:
    assert stats.binomtest(int((drawn[:, column] != 0).sum()), 50_000, 0.12).pvalue > 1e-4


def test_half_of_the_stretches_are_along_an_axis(drawn: np.ndarray) -> None:
    stretched = drawn[drawn[:, 5] != 0]
    assert stats.binomtest(int((stretched[:, 4] != 0).sum()), len(stretched), 0.5).pvalue > 1e-4
    assert not drawn[drawn[:, 5] == 0, 4].any()


@pytest.mark.parametrize("column", [3, 4])
def test_angles_are_uniform_over_the_whole_turn(drawn: np.ndarray, column: int) -> None:
    angles = drawn[drawn[:, column] != 0, column]
    assert np.abs(angles).max() <= math.pi + 1e-6
    assert stats.kstest(angles, stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-4


@pytest.mark.parametrize("column", [2, 5, 6, 7])
def test_sizes_and_shifts_are_standard_normal(drawn: np.ndarray, column: int) -> None:
    values = drawn[drawn[:, column] != 0, column]
    assert stats.kstest(values, stats.norm.cdf).pvalue > 1e-4
    assert values.mean() == pytest.approx(0, abs=4 / len(values) ** 0.5)
    assert values.var() == pytest.approx(1, abs=4 * (2 / len(values)) ** 0.5)


def test_the_two_numbers_of_a_shift_are_used_together(drawn: np.ndarray) -> None:
    used = drawn != 0
    assert (used[:, 6] == used[:, 7]).all()


def test_different_transformations_are_used_independently(drawn: np.ndarray) -> None:
    used = (drawn != 0)[:, [0, 2, 3, 5, 6]].astype(float)
    correlations = np.corrcoef(used.T)[np.triu_indices(5, 1)]
    assert np.abs(correlations).max() < 4.5 / 50_000**0.5
    shifts = drawn[drawn[:, 6] != 0][:, 6:]
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 4.5 / len(shifts) ** 0.5


def test_a_probability_of_0_only_mirrors_and_of_1_uses_all() -> None:
    none = draw_parameters(200, 0.0, seed=0)
    assert not none[:, 1:].any() and none[:, 0].any()
    every = draw_parameters(200, 1.0, seed=0)
    assert (every[:, [2, 3, 5, 6, 7]] != 0).all()
    assert 50 < (every[:, 4] != 0).sum() < 150
    assert 50 < every[:, 1].sum() < 150


def test_labels_are_nine_and_zero_for_an_image_as_it_is() -> None:
    labels = augmentation_labels(torch.zeros(4, 8))
    assert labels.shape == (4, 9)
    assert not labels.any()


def test_labels_are_those_of_edms_table_6() -> None:
    a = torch.tensor([[1.0, 1.0, 0.7, 0.3, 0.5, -1.5, 0.25, -0.75]])
    wanted = [1, 1, 0.7, math.cos(0.3) - 1, math.sin(0.3), -1.5 * math.cos(0.5), -1.5 * math.sin(0.5), 0.25, -0.75]
    assert augmentation_labels(a)[0].tolist() == pytest.approx(wanted)


# Images and coordinates


@pytest.mark.parametrize("side", [8, 16, 33])
def test_no_transformation_gives_the_image_and_the_full_grid_back(side: int) -> None:
    images = random_images(2, side)
    moved, where = augment(images, torch.zeros(2, 8))
    torch.testing.assert_close(moved, images, rtol=0, atol=255e-4)
    torch.testing.assert_close(where, coordinate_grid(side, side).expand(2, -1, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "axis"), [("a0", 3), ("a1", 2)])
def test_a_flip_equals_torch_flip_and_negates_one_coordinate(name: str, axis: int) -> None:
    images, grid = random_images(), coordinate_grid(R, R)[None]
    moved, where = augment(images, parameters(**{name: 1.0}))
    torch.testing.assert_close(moved, images.flip(axis), rtol=0, atol=255e-4)
    signs = torch.tensor([-1.0, 1.0] if axis == 3 else [1.0, -1.0])[:, None, None]
    torch.testing.assert_close(where, grid * signs, rtol=0, atol=1e-5)


def test_half_a_turn_is_both_flips() -> None:
    images, grid = random_images(), coordinate_grid(R, R)[None]
    moved, where = augment(images, parameters(a3=math.pi))
    torch.testing.assert_close(moved, images.flip(2, 3), rtol=0, atol=255e-4)
    torch.testing.assert_close(where, -grid, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("angle", "turns"), [(math.pi / 2, 1), (-math.pi / 2, -1)])
def test_a_quarter_turn_is_torchs_for_image_and_coordinates_alike(angle: float, turns: int) -> None:
    images, grid = random_images(), coordinate_grid(R, R)[None]
    moved, where = augment(images, parameters(a3=angle))
    torch.testing.assert_close(moved, images.rot90(turns, (2, 3)), rtol=0, atol=255e-4)
    torch.testing.assert_close(where, grid.rot90(turns, (2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "axis"), [("a6", 3), ("a7", 2)])
def test_a_shift_of_one_moves_an_eighth_of_the_image_to_the_right_or_down(name: str, axis: int) -> None:
    images = random_images()
    moved, where = augment(images, parameters(**{name: 1.0}))  # 0.25 in coordinates is 4 of these pixels
    torch.testing.assert_close(moved.narrow(axis, 4, R - 4), images.narrow(axis, 0, R - 4), rtol=0, atol=255e-4)
    grid = coordinate_grid(R, R)[None]
    torch.testing.assert_close(where.narrow(axis, 4, R - 4), grid.narrow(axis, 0, R - 4), rtol=0, atol=1e-5)
    # what comes in at the edge is the reflection of what stands there
    mirrored = images.narrow(axis, 1, 4).flip(axis)
    torch.testing.assert_close(moved.narrow(axis, 0, 4), mirrored, rtol=0, atol=255e-4)


@pytest.mark.parametrize(("size", "factor"), [(5.0, 2.0), (-5.0, 0.5)])
def test_a_scale_of_five_doubles_and_of_minus_five_halves(size: float, factor: float) -> None:
    _, where = augment(random_images(), parameters(a2=size))
    inner = slice(R // 4, -(R // 4))  # at half the size the whole image stands in the middle half
    found, wanted = where[..., inner, inner], coordinate_grid(R, R)[None, :, inner, inner] / factor
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_doubled_image_shows_its_middle_half() -> None:
    images = random_images()
    moved, _ = augment(images, parameters(a2=5.0))  # every second pixel is one of the image's own
    torch.testing.assert_close(moved[..., ::2, ::2], images[..., 8:25, 8:25], rtol=0, atol=255e-4)


@pytest.mark.parametrize("size", [-5.0, 5.0])
def test_a_stretch_doubles_one_direction_and_halves_the_other(size: float) -> None:
    _, where = augment(random_images(), parameters(a5=size))
    grid, inner = coordinate_grid(R, R), slice(R // 4, -(R // 4))
    factors = torch.tensor([2.0 ** (0.2 * size), 2.0 ** (-0.2 * size)])[:, None, None]
    torch.testing.assert_close(where[0, :, inner, inner], (grid / factors)[:, inner, inner], rtol=0, atol=1e-5)


def test_a_stretch_along_an_angle_leaves_areas_as_they_are() -> None:
    _, where = augment(random_images(), parameters(a4=0.7, a5=1.3))
    middle = slice(R // 2 - 3, R // 2 + 4)
    there = where[0, :, middle, middle].double()
    across = (there[:, :, 1:] - there[:, :, :-1]).mean((1, 2)) / PIXEL
    down = (there[:, 1:] - there[:, :-1]).mean((1, 2)) / PIXEL
    jacobian = torch.stack([across, down], dim=1)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1, abs=1e-4)
    sizes = torch.linalg.svdvals(jacobian).tolist()
    assert sizes == pytest.approx([2 ** (0.2 * 1.3), 2 ** (-0.2 * 1.3)], abs=1e-4)
    assert float(jacobian[0, 1]) == pytest.approx(float(jacobian[1, 0]), abs=1e-4)  # no rotation in it


def test_transformations_follow_one_another_as_in_the_table() -> None:
    # flipped, then turned by a quarter, then shifted: a shift that came first would be turned as well
    images = random_images()
    moved, where = augment(images, parameters(a0=1.0, a3=math.pi / 2, a6=1.0))
    turned, grid = images.flip(3).rot90(1, (2, 3)), coordinate_grid(R, R)[None].flip(3).rot90(1, (2, 3))
    torch.testing.assert_close(moved[..., 4:], turned[..., :-4], rtol=0, atol=255e-4)
    torch.testing.assert_close(where[..., 4:], grid[..., :-4], rtol=0, atol=1e-5)


def test_after_any_transformation_the_coordinates_are_where_the_content_came_from() -> None:
    chosen = draw_parameters(60, 0.8, seed=5)
    images = coordinate_grid(R, R).expand(60, -1, -1, -1)  # an image whose content is its coordinates
    moved, where = augment(images, chosen)
    whole = (where.abs() < 1 - 2.5 * PIXEL).all(1, keepdim=True).expand_as(where)  # no fold among a bicubic's pixels
    assert whole.float().mean() > 0.5
    # torch's cubic has a = -0.75, which bends a straight line by at most a twentieth of a pixel
    assert float((moved - where)[whole].abs().max()) < 0.05 * PIXEL
    assert float((moved - where).abs().max()) < 0.5 * PIXEL


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_coordinates_stay_inside_the_image_for_all_parameters(scale: float) -> None:
    chosen = draw_parameters(100, 1.0, seed=6) * scale
    chosen[:, :2] = chosen[:, :2].clamp(max=1)
    moved, where = augment(random_images(100, 16), chosen)
    assert where.abs().max() <= 1
    assert moved.isfinite().all()


def test_stored_bytes_are_transformed_as_numbers() -> None:
    images = random_images(2, 16).to(torch.uint8)
    chosen = draw_parameters(2, 1.0, seed=7)
    moved, where = augment(images, chosen)
    assert moved.dtype == where.dtype == torch.float32
    assert moved.shape == images.shape and where.shape == (2, 2, 16, 16)
    assert torch.equal(moved, augment(images.float(), chosen)[0])


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    images, chosen = random_images(6, 16), draw_parameters(6, 0.8, seed=8)
    together, grids = augment(images, chosen)
    for number in range(6):
        alone, grid = augment(images[number : number + 1], chosen[number : number + 1])
        torch.testing.assert_close(alone[0], together[number], rtol=0, atol=1e-2)
        torch.testing.assert_close(grid[0], grids[number], rtol=0, atol=1e-5)


# In a step


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("latent", [False, True])
def test_augmentation_changes_no_other_draw_of_a_block(size: int, latent: bool) -> None:
    plain = draws_of_block(2, 3, size, latent)
    moved = draws_of_block(2, 3, size, latent, augmentation=0.12)
    for name in ("label_kept", "mirrored", "sigma", "corner", "posterior", "noise"):
        assert torch.equal(getattr(plain, name), getattr(moved, name))
    assert plain.augmentation.shape == (8, 0)
    assert moved.augmentation.shape == (8, 8)


def test_augmentation_is_repeated_and_shared_by_patch_sizes_and_differs_by_block() -> None:
    large, again, small = (draws_of_block(2, 3, size, augmentation=0.5).augmentation for size in (16, 16, 4))
    assert torch.equal(large, again)
    assert torch.equal(large, small)
    assert not torch.equal(large, draws_of_block(2, 4, 16, augmentation=0.5).augmentation)
    assert not torch.equal(large, draws_of_block(3, 3, 16, augmentation=0.5).augmentation)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_a_crop_with_a_grid_of_its_own_has_slices_of_it(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    images = torch.rand(10, 3, 12, 12, generator=generator)
    grid = torch.rand(10, 2, 12, 12, generator=generator)
    corners = torch.randint(0, 12 - size + 1, (10, 2), generator=generator)
    patches, coordinates = crop(images, corners, size, grid)
    for number, (left, top) in enumerate(corners.tolist()):
        rows, columns = slice(top, top + size), slice(left, left + size)
        assert torch.equal(patches[number], images[number, :, rows, columns])
        assert torch.equal(coordinates[number], grid[number, :, rows, columns])


class Witness(nn.Module):
    """Stands where the denoiser does and remembers what it was given."""

    classes, sigma_data, coordinates = 0, 0.5, "linear"

    def forward(
        self, noisy: Tensor, sigma: Tensor, coordinates: Tensor, labels: None, *, augmentation: Tensor | None
    ) -> Tensor:
        self.noisy, self.where, self.labels = noisy, coordinates, augmentation
        return torch.zeros_like(noisy)


def seen_by_the_network(augmentation: float, precision: str = "fp32") -> tuple[Witness, Tensor]:
    """What a network sees of 32 crops, without noise, of images whose content is their coordinates."""
    method = StepSettings(
        seed=1, schedule=patch_schedule(R - 1, 0.5), updates=1, batch_size=32, block_size=32, lr=1.0,
        lr_rampup_images=0, noise_mean=-20.0, noise_std=1e-3, augmentation=augmentation,
        precision=precision,
    )  # fmt: skip
    draws = Draws(1).crops(CropBatch(0, range(1), 32, 2, R - 1, 8, False, CPU, augmentation))
    rows = StoredRows(coordinate_grid(R - 1, R - 1).expand(32, -1, -1, -1), torch.zeros(32))
    witness = Witness()
    crop_losses(witness, rows, draws, 8, method, Normalisation("latents", (0.0, 0.0), (1.0, 1.0)))  # type: ignore[arg-type]
    return witness, draws.augmentation


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_augmented_crop_has_the_coordinates_of_its_content(precision: str) -> None:
    seen, chosen = seen_by_the_network(0.8, precision)
    whole = (seen.where.abs() < 1 - 2.5 * PIXEL).all(1, keepdim=True).expand_as(seen.where)
    assert whole.float().mean() > 0.5
    assert float((seen.noisy - seen.where)[whole].abs().max()) < 0.06 * PIXEL
    assert seen.labels is not None
    assert torch.equal(seen.labels, augmentation_labels(chosen))


def test_without_augmentation_there_are_no_labels_and_the_plain_grid() -> None:
    seen, _ = seen_by_the_network(0.0)
    assert seen.labels is None
    torch.testing.assert_close(seen.noisy, seen.where, rtol=0, atol=1e-5)
