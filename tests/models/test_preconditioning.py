"""The denoiser is EDM's preconditioning around any network, with the patch's coordinates as plain channels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_denoiser

SIGMAS = torch.tensor([0.002, 0.5, 7.0, 80.0])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def what_the_network_sees(denoiser: Denoiser, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    seen: list[Any] = []
    hook = denoiser.model.register_forward_hook(lambda _, arguments, __: seen.append(arguments))
    with torch.no_grad():
        denoiser(*inputs, **options)
    hook.remove()
    x, noise_condition, labels = seen[0]
    return x, noise_condition, labels


@torch.no_grad()
def test_a_silent_network_leaves_the_skip_connection(linear_denoiser: Denoiser, images: Tensor) -> None:
    c_skip = 0.5**2 / (0.5**2 + SIGMAS**2)
    torch.testing.assert_close(linear_denoiser(images, SIGMAS), c_skip[:, None, None, None] * images)


@torch.no_grad()
def test_the_networks_output_is_scaled_by_c_out(tiny_denoiser: Callable[..., Denoiser], images: Tensor) -> None:
    denoiser = tiny_denoiser(sigma_data=0.7)
    outputs: list[Tensor] = []
    hook = denoiser.model.register_forward_hook(lambda _, __, output: outputs.append(output))
    found = denoiser(images, SIGMAS)
    hook.remove()
    c_skip, c_out = 0.49 / (0.49 + SIGMAS**2), SIGMAS * 0.7 / (0.49 + SIGMAS**2).sqrt()
    wanted = c_skip[:, None, None, None] * images + c_out[:, None, None, None] * outputs[0]
    torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_at_sigma_near_0_the_estimate_is_the_input(tiny_denoiser: Callable[..., Denoiser], images: Tensor) -> None:
    denoiser = tiny_denoiser()
    errors = [float((denoiser(images, sigma) - images).abs().max()) for sigma in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4


def test_images_are_scaled_to_unit_variance_and_coordinates_are_not(
    tiny_denoiser: Callable[..., Denoiser], images: Tensor
) -> None:
    where = torch.rand(4, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    x, noise_condition, _ = what_the_network_sees(tiny_denoiser(), images, SIGMAS, where)
    c_in = 1 / (0.25 + SIGMAS**2).sqrt()
    torch.testing.assert_close(x[:, :3], c_in[:, None, None, None] * images)
    assert torch.equal(x[:, 3:], where)
    torch.testing.assert_close(noise_condition, SIGMAS.log() / 4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_inputs_of_any_float_dtype_give_float32(
    tiny_denoiser: Callable[..., Denoiser], images: Tensor, dtype: torch.dtype
) -> None:
    denoiser = tiny_denoiser()
    noisy, sigma = images.to(dtype), torch.full((4,), 0.75, dtype=dtype)  # a level that every dtype can hold
    found = denoiser(noisy, sigma)
    assert found.dtype == torch.float32
    assert torch.equal(found, denoiser(noisy.float(), torch.full((4,), 0.75)))


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.75, 3, torch.tensor(0.75, dtype=torch.float64), torch.tensor(0.75).half()])
def test_a_scalar_sigma_applies_to_the_whole_batch(
    tiny_denoiser: Callable[..., Denoiser], images: Tensor, sigma: Tensor | float
) -> None:
    denoiser = tiny_denoiser()
    assert torch.equal(denoiser(images, sigma), denoiser(images, torch.full((4,), float(sigma))))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 8), (8, 24)])
def test_no_coordinates_mean_the_full_grid_of_the_inputs_own_size(
    tiny_denoiser: Callable[..., Denoiser], height: int, width: int
) -> None:
    x, _, _ = what_the_network_sees(tiny_denoiser(), torch.zeros(2, 3, height, width), 1.0)
    for sample in x[:, 3:]:
        torch.testing.assert_close(sample[0], torch.linspace(-1, 1, width).expand(height, width))
        torch.testing.assert_close(sample[1], torch.linspace(-1, 1, height)[:, None].expand(height, width))


def test_a_network_without_coordinates_has_no_channels_for_them(
    tiny_denoiser: Callable[..., Denoiser], images: Tensor
) -> None:
    denoiser = tiny_denoiser(coordinates="none")
    x, _, _ = what_the_network_sees(denoiser, images, 1.0)
    assert x.shape[1] == 3
    with pytest.raises(ValueError, match="coordinates"):
        denoiser(images, 1.0, torch.zeros(4, 2, 16, 16))


def test_no_labels_mean_the_zero_vector(tiny_denoiser: Callable[..., Denoiser], images: Tensor) -> None:
    _, _, labels = what_the_network_sees(tiny_denoiser(classes=5), images, 1.0)
    assert labels is not None
    assert labels.tolist() == [[0] * 5] * 4


def test_an_unknown_network_is_refused(tiny_config: Callable[..., DenoiserConfig]) -> None:
    with pytest.raises(ValueError, match=r"vit.*dhariwal, song"):
        build_denoiser(tiny_config(network="vit"))
