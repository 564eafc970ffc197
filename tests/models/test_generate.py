"""Generation turns seeds into images that no neighbour, order or padding can change."""

from collections.abc import Callable

import pytest
import torch
from sampling_models import pixel_model
from torch import Tensor

from patchloom.models.checkpoints import SamplingModel
from patchloom.models.denoiser import Denoiser
from patchloom.models.generate import (
    SAMPLERS,
    Sampling,
    class_number,
    default_labels,
    generate,
    generate_padded,
    one_thread,
)
from patchloom.models.noise import karras_sigmas
from patchloom.models.samplers import SeededNoise

SEEDS = [3, 14, 15, 92, 65, 35, 89]


@pytest.fixture(scope="module")
def model(tiny_denoiser: Callable[..., Denoiser]) -> SamplingModel:
    return pixel_model(tiny_denoiser(classes=3))


def by_seed(model: SamplingModel, seeds: list[int], batch: int = 4) -> dict[int, Tensor]:
    labels = default_labels(seeds, 3)
    return dict(zip(seeds, generate_padded(model, seeds, labels, batch, Sampling(steps=3, guidance=1.3)), strict=True))


@pytest.fixture(scope="module")
def wanted(model: SamplingModel) -> dict[int, Tensor]:
    return by_seed(model, SEEDS)


def test_images_are_bytes_and_differ_by_seed(wanted: dict[int, Tensor]) -> None:
    assert all(image.shape == (3, 16, 16) and image.dtype == torch.uint8 for image in wanted.values())
    assert len({image.numpy().tobytes() for image in wanted.values()}) == len(SEEDS)


@pytest.mark.parametrize("seeds", [SEEDS[::-1], SEEDS[2:], [65], [65, 3, 65 + 27, 15, 14]], ids=str)
def test_an_image_does_not_depend_on_neighbours_order_or_padding(
    model: SamplingModel, wanted: dict[int, Tensor], seeds: list[int]
) -> None:
    for seed, image in by_seed(model, seeds).items():
        assert torch.equal(image, wanted[seed])


def test_the_label_matters(model: SamplingModel) -> None:
    first, second, none = (generate(model, [3] * 4, [label] * 4, Sampling(steps=3))[0] for label in (0, 1, -1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, none)


def test_gaussian_data_is_sampled_along_its_exact_path(linear_denoiser: Denoiser) -> None:
    made = generate(pixel_model(linear_denoiser), [1, 2], [-1, -1], Sampling(steps=100))
    # the flow of N(0, 0.5^2) shrinks noise at sigma = 80 by 0.5 / sqrt(0.5^2 + 80^2)
    wanted = SeededNoise([1, 2], (3, 16, 16))().double() * 80 * 0.5 / (0.25 + 80**2) ** 0.5
    grey = (wanted * 127.5 + 128).clamp(0, 255)
    assert float((made.double() + 0.5 - grey).abs().max()) < 1.5
    assert karras_sigmas(100)[0].item() == pytest.approx(80)


def test_labels_go_in_turn_by_seed_and_are_minus_1_without_classes() -> None:
    assert default_labels([0, 1, 2, 3, 4, 5], 3) == [0, 1, 2, 0, 1, 2]
    assert default_labels([7, 6], 4) == [3, 2]
    assert default_labels([0, 1], 0) == [-1, -1]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("canvas", ["rescale", "extrapolate"])
def test_every_grey_level_of_a_reference_stays_as_it_is(model: SamplingModel, sampler: str, canvas: str) -> None:
    reference = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    sampling = Sampling(sampler, steps=6, size=(24, 32), canvas=canvas, guidance=1.3)
    made = generate(model, [1, 2], [0, -1], sampling, reference)
    assert made.shape == (2, 3, 24, 32)
    assert (made[:, :, 4:20, 8:24] == reference).all()
    assert not torch.equal(made[0], made[1])


def test_a_class_is_known_by_its_name_or_its_number() -> None:
    names = ["cat", "dog", "7"]
    assert [class_number(label, names) for label in ("dog", 1, "1", "7", 0, None, "", -1, "-1")] == [
        1, 1, 1, 2, 0, -1, -1, -1, -1,
    ]  # fmt: skip
    for label in ("cow", 3, "3", -2, "1.0"):
        with pytest.raises(ValueError, match="it knows cat, dog, 7"):
            class_number(label, names)
    with pytest.raises(ValueError, match="it has no classes"):
        class_number(0, [])


def test_one_thread_is_restored_at_the_end() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before
