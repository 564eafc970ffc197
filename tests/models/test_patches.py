"""Patches are drawn as Eq. 5 says, lie anywhere in the image alike, and know exactly where they lie."""

import numpy as np
import pytest
import torch
from scipy import stats

from patchloom.models.patches import coordinate_grid, crop, offsets, patch_schedule, patch_side
from patchloom.models.random_draws import Draws


def test_a_hundred_thousand_draws_of_sizes_follow_equation_5() -> None:
    schedule, draws = patch_schedule(64, p=0.5), 100_000
    drawn = np.array([schedule.size_at(step, draws, Draws(0).size_uniform(step)).pixels for step in range(draws)])
    counts = [(drawn == pixels).sum() for pixels in (64, 32, 16)]
    assert sum(counts) == draws
    assert stats.chisquare(counts, [0.5 * draws, 0.3 * draws, 0.2 * draws]).pvalue > 1e-4


@pytest.mark.parametrize(("p", "wanted"), [(0.0, {32, 16}), (1.0, {64})])
def test_p_of_0_and_1_leave_no_room_for_chance(p: float, wanted: set[int]) -> None:
    schedule = patch_schedule(64, p)
    uniforms = [0.0, *np.linspace(0.001, 0.999, 500), np.nextafter(1, 0)]
    assert {schedule.size_at(0, 1, uniform).pixels for uniform in uniforms} == wanted


def test_a_larger_p_only_turns_small_patches_into_full_images() -> None:
    uniforms = [Draws(3).size_uniform(step) for step in range(500)]
    fewer, more = (
        {
            step
            for step, uniform in enumerate(uniforms)
            if patch_schedule(64, p).size_at(step, 500, uniform).pixels == 64
        }
        for p in (0.25, 0.5)
    )
    assert fewer < more


def test_offsets_are_uniform_and_reach_the_last_position() -> None:
    uniforms = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(0))
    corners = offsets(uniforms, resolution=32, size=16).numpy()
    for axis in (0, 1):
        counts = np.bincount(corners[:, axis], minlength=17)
        assert len(counts) == 17
        assert stats.chisquare(counts).pvalue > 1e-4


def test_offsets_along_x_and_y_are_independent() -> None:
    uniforms = torch.rand(100_000, 2, generator=torch.Generator().manual_seed(1))
    corners = offsets(uniforms, resolution=8, size=5)
    joint = np.bincount((corners[:, 0] * 4 + corners[:, 1]).numpy(), minlength=16)
    assert stats.chisquare(joint).pvalue > 1e-4


def test_the_largest_uniform_gives_the_last_position_and_none_beyond() -> None:
    largest = torch.tensor([[np.nextafter(np.float32(1), np.float32(0))] * 2])
    for resolution in range(2, 600):
        assert offsets(largest, resolution, 1).tolist() == [[resolution - 1] * 2]


def test_a_full_size_crop_lies_at_0() -> None:
    uniforms = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    assert not offsets(uniforms, 64, 64).any()


@pytest.mark.parametrize("size", [1, 5, 8, 12])
def test_a_crop_and_its_coordinates_are_slices_of_the_image_and_of_the_grid(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (20, 3, 12, 12), generator=generator, dtype=torch.uint8)
    corners = torch.randint(0, 12 - size + 1, (20, 2), generator=generator)
    patches, coordinates = crop(images, corners, size)
    grid = coordinate_grid(12, 12)
    assert patches.dtype == torch.uint8
    for image, (left, top), patch, where in zip(images, corners.tolist(), patches, coordinates, strict=True):
        rows, columns = slice(top, top + size), slice(left, left + size)
        assert torch.equal(patch, image[:, rows, columns])
        assert torch.equal(where, grid[:, rows, columns])


def test_the_grid_runs_from_minus_1_to_1_with_x_first() -> None:
    grid = coordinate_grid(height=3, width=5)
    assert grid.dtype == torch.float32
    assert grid[0].tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
    assert grid[1].tolist() == [[-1] * 5, [0] * 5, [1] * 5]


def test_the_grid_is_the_papers_formula() -> None:
    pixel = np.arange(64)
    np.testing.assert_allclose(coordinate_grid(64, 64)[0, 7], (pixel / 63 - 0.5) * 2, atol=1e-6)


def test_progressive_goes_from_small_to_full_at_the_stated_fractions() -> None:
    schedule = patch_schedule(64, p=0.5, kind="progressive")
    sizes = [schedule.size_at(step, 1000, uniform=0.0).pixels for step in range(1000)]
    assert sizes == [16] * 200 + [32] * 300 + [64] * 500


def test_the_mean_multiplier_is_1_9_at_p_one_half() -> None:
    assert patch_schedule(64, p=0.5).mean_multiplier == pytest.approx(0.5 * 1 + 0.3 * 2 + 0.2 * 4)


@pytest.mark.parametrize(
    ("images", "batch", "p", "updates"),
    [(200_000_000, 512, 0.5, 205_592), (200_000_000, 512, 1.0, 390_625), (1_000, 10, 0.0, 36), (1, 512, 1.0, 1)],
)
def test_a_run_has_its_images_over_the_mean_step_updates(images: int, batch: int, p: float, updates: int) -> None:
    assert patch_schedule(64, p).updates(images, batch) == updates


def test_sizes_are_sorted_and_weights_are_shares() -> None:
    schedule = patch_schedule(32, p=0.2, smaller=[(0.25, 3, 4), (0.5, 1, 2), (0.75, 4, 1)])
    assert [size.pixels for size in schedule.sizes] == [32, 24, 16, 8]
    assert [size.probability for size in schedule.sizes] == pytest.approx([0.2, 0.4, 0.1, 0.3])
    assert [size.batch_multiplier for size in schedule.sizes] == [1, 1, 2, 4]


@pytest.mark.parametrize("fraction", [0.3, 0.001])
def test_a_fraction_that_gives_no_whole_pixels_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"fraction {fraction} of 64 pixels"):
        patch_schedule(64, p=0.5, smaller=[(fraction, 1.0, 2)])


@pytest.mark.parametrize(
    ("fraction", "resolution", "side"),
    [(0.28, 100, 28), (0.07, 100, 7), (0.57, 100, 57), (1 / 3, 96, 32), (0.5, 64, 32), (0.3125, 16, 5),
     (0.3, 64, None), (0.5, 63, None), (0.33333, 96, None), (0.0, 64, None), (1e-9, 64, None)],
)  # fmt: skip
def test_side_of_a_patch_does_not_depend_on_rounding(fraction: float, resolution: int, side: int | None) -> None:
    assert patch_side(fraction, resolution) == side


def test_every_fraction_of_two_digits_of_100_pixels_is_a_whole_number() -> None:
    for hundredths in range(1, 100):
        schedule = patch_schedule(100, 0.5, smaller=[(hundredths / 100, 1.0, 2)])
        assert [size.pixels for size in schedule.sizes] == [100, hundredths]
