"""Generation turns seeds into images that no neighbour, order or padding can change."""

from collections.abc import Callable
from contextlib import AbstractContextManager

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
)
from patchloom.models.guidance import guided
from patchloom.models.inpainting import KnownPixels
from patchloom.models.layers import Convolution
from patchloom.models.noise import karras_sigmas
from patchloom.models.precision import fixed_arithmetic, one_thread
from patchloom.models.samplers import SeededNoise
from patchloom.models.sampling_options import CANVASES

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
@pytest.mark.parametrize("canvas", CANVASES)
def test_every_grey_level_of_a_reference_stays_as_it_is(model: SamplingModel, sampler: str, canvas: str) -> None:
    reference = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).repeat(3, 1, 1)
    canvas_image, mask = torch.zeros(3, 24, 32, dtype=torch.uint8), torch.zeros(24, 32, dtype=torch.bool)
    canvas_image[:, 4:20, 8:24], mask[4:20, 8:24] = reference, True
    sampling = Sampling(sampler, steps=6, size=(24, 32), canvas=canvas, guidance=1.3)
    made = generate(model, [1, 2], [0, -1], sampling, KnownPixels(canvas_image, mask, "reconstruct"))
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


@pytest.mark.parametrize("settings", [one_thread, fixed_arithmetic])
def test_one_thread_is_restored_at_the_end(settings: Callable[[], AbstractContextManager[None]]) -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), settings():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == before


def test_fixed_arithmetic_has_no_tf32_and_no_choice_by_speed() -> None:
    def settings() -> list[object]:
        cudnn = torch.backends.cudnn
        return [torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic]

    before = settings()
    torch.backends.cudnn.benchmark = True
    with fixed_arithmetic():
        assert settings() == ["highest", False, False, True]
    assert torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    assert settings() == before


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_computes_in_it_and_changes_few_grey_levels(
    model: SamplingModel, precision: str, dtype: torch.dtype
) -> None:
    computed = set[torch.dtype]()
    hooks = [
        module.register_forward_hook(lambda _, __, out: computed.add(out.dtype))
        for module in model.denoiser.modules()
        if isinstance(module, Convolution) and module.kernel
    ]
    made = [generate(model, SEEDS, [0] * 7, Sampling(steps=4, precision=chosen)) for chosen in ("fp32", precision)]
    for hook in hooks:
        hook.remove()
    assert computed == {torch.float32, dtype}
    assert not torch.equal(*made)
    assert float((made[0].float() - made[1].float()).abs().mean()) < 1


def test_values_that_overflow_in_half_precision_are_an_error(tiny_denoiser: Callable[..., Denoiser]) -> None:
    denoiser = tiny_denoiser()
    with torch.no_grad():
        next(denoiser.model.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match=r"precision.*fp16.*fp32"):
        generate(pixel_model(denoiser), [1], [-1], Sampling(steps=2, precision="fp16"))


@torch.no_grad()
def test_guidance_in_one_batch_gives_the_same_estimate(model: SamplingModel) -> None:
    x, sigma = torch.randn(3, 3, 16, 16, dtype=torch.float64), 0.7
    batches: list[int] = []
    hook = model.denoiser.model.register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
    grid = torch.zeros(2, 16, 16)
    one, two = (
        guided(model.denoiser, torch.eye(3), 1.3, coordinates=grid, in_one_batch=together)(x, sigma)
        for together in (True, False)
    )
    hook.remove()
    assert batches == [6, 3, 3]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
