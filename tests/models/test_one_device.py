"""The whole training step and sampling run on the meta device, where any stray tensor or hidden wait fails."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_device import OneDevice, StrayOperation
from small_networks import NETWORKS, SIDE, small_config
from torch import Tensor, nn

from patchloom.models.autoencoder import Autoencoder
from patchloom.models.cards import AutoencoderCard, DenoiserConfig, ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.denoiser import Denoiser, skeleton
from patchloom.models.ema import HalfLifeEMA, PowerEMA, WeightAverage
from patchloom.models.generate import SAMPLERS, Sampling, generate
from patchloom.models.gradients import Gradients
from patchloom.models.inpainting import KnownPixels
from patchloom.models.loss import SIGMA_BINS
from patchloom.models.normalisation import Normalisation, pixel_normalisation
from patchloom.models.patches import COORDINATE_CHANNELS, patch_schedule
from patchloom.models.step import StoredRows, TrainingState, training_step
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.pipelines.sample.options import INPAINTING_METHODS

META = torch.device("meta")
LATENTS = Normalisation("latents", (0.1, 0.2, 0.3, 0.4), (1.0, 2.0, 3.0, 4.0))
AVERAGES: dict[str, Callable[[nn.Module], WeightAverage]] = {
    "half-life": lambda module: HalfLifeEMA(module, 1000),
    "power": lambda module: PowerEMA(module, 0.05),
}


def step_settings(**changes: Any) -> StepSettings:
    values = {"seed": 5, "schedule": patch_schedule(SIDE, 0.5), "updates": 10, "batch_size": 8, "block_size": 4,
              "lr": 1e-3, "lr_rampup_images": 0}  # fmt: skip
    return StepSettings(**{**values, **changes})


def check_step(config: DenoiserConfig, settings: StepSettings, latents: bool, ema: str) -> None:
    """Take a step with tensors that have shapes and no values. Torch's fused Adam does not know the meta device."""
    denoiser = skeleton(config).train()
    sizes = len(settings.schedule.sizes)
    state = TrainingState(
        denoiser, [AVERAGES[ema](denoiser)], torch.optim.Adam(denoiser.parameters(), foreach=True),
        Gradients(denoiser, (sizes, len(SIGMA_BINS))), torch.amp.GradScaler("meta", enabled=False), [0] * sizes,
    )  # fmt: skip
    plan = plan_step(settings, 0, 0)
    work = [(group, stored_rows(config, len(group.crops), latents)) for group in plan.share()]
    with OneDevice(META):
        training_step(state, settings, plan, work, LATENTS if latents else pixel_normalisation(), lambda _: None)
    modules = [state.denoiser, state.emas[0].module]
    for tensor in [state.gradients.flat, *(value for module in modules for value in module.state_dict().values())]:
        assert tensor.device == META
    assert (state.step, state.images_seen) == (1, plan.crops)


def stored_rows(config: DenoiserConfig, count: int, latents: bool) -> StoredRows:
    shape, label = (count, config.channels, SIDE, SIDE), torch.empty(count, dtype=torch.int64, device=META)
    if latents:
        return StoredRows(torch.empty(shape, device=META), label, torch.empty(shape, device=META))
    return StoredRows(torch.empty(shape, dtype=torch.uint8, device=META), label)


LABELS = {"classes": 5, "patch_size": True}
CONDITIONS = {**LABELS, "augmentation": True}


@pytest.mark.parametrize(
    ("network", "draw", "latents", "coordinates", "conditions", "ema"),
    [
        ("DDPM++", "shared", False, "linear", {}, "half-life"),
        ("DDPM++", "independent", True, "periodic", LABELS, "power"),
        ("NCSN++", "stratified", False, "implicit", CONDITIONS, "power"),
        ("NCSN++", "shared", True, "none", {}, "half-life"),
        ("ADM", "stratified", True, "linear", LABELS, "half-life"),
        ("ADM", "independent", False, "periodic", CONDITIONS, "power"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(
                NETWORKS, ("shared", "stratified"), (False, True), COORDINATE_CHANNELS, ({}, CONDITIONS), ("power",)
            )
        ),
    ],
)  # fmt: skip
def test_a_step_stays_on_its_device(
    network: str, draw: str, latents: bool, coordinates: str, conditions: dict[str, Any], ema: str
) -> None:
    config = small_config(network, channels=4 if latents else 3, coordinates=coordinates, **conditions)
    settings = step_settings(
        draw=draw, emulated_ranks=2 if draw == "independent" else 1, mirror=not latents, reduction="sum",
        label_dropout=0.1, augmentation=0.12 if "augmentation" in conditions else 0.0,
    )  # fmt: skip
    check_step(config, settings, latents, ema)


class HalvingCodec(Autoencoder):
    """An autoencoder whose latents are the means of 2 x 2 pixels."""

    downscale, latent_channels = 2, 4

    @classmethod
    def load(cls, folder: object, device: object, dtype: object) -> "HalvingCodec":
        return cls()

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        means = nn.functional.avg_pool2d(images.float(), 2)
        return torch.cat([means, means[:, :1]], dim=1), None

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents[:, :3], scale_factor=2.0).to(torch.uint8)


class OneConvolution(nn.Module):
    """The fastest network, for tests of everything around it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        return self.convolution(x) + noise[:, None, None, None] + labels.sum(1)[:, None, None, None]


def meta_model(config: DenoiserConfig, denoiser: Denoiser, latents: bool = False) -> SamplingModel:
    normalisation, codec = (LATENTS, HalvingCodec()) if latents else (pixel_normalisation(), None)
    described = AutoencoderCard(
        class_name="HalvingCodec", weights_sha256="0" * 64, downscale=2, latent_channels=4, scale=1.0, shift=0.0
    )
    card = ModelCard(denoiser=config, normalisation=normalisation, autoencoder=described if latents else None)
    return SamplingModel(denoiser.eval(), normalisation, codec, card)


@pytest.mark.parametrize("guidance", [{}, {"guidance": 1.3}, {"guidance": 1.3, "guidance_between": (0.1, 5.0)}])
@pytest.mark.parametrize("sampler", [*SAMPLERS, "heun with churn"])
def test_every_sampler_stays_on_its_device(sampler: str, guidance: dict[str, Any]) -> None:
    churn = {"churn": 10.0} if "churn" in sampler else {}
    with META:
        denoiser = Denoiser(OneConvolution(), channels=3, resolution=SIDE, classes=5)
    model = meta_model(small_config("DDPM++", classes=5), denoiser)
    with OneDevice(META):
        images = generate(model, [0, 1, 2**40], [0, -1, 4], Sampling(sampler.split()[0], 5, **churn, **guidance))
    assert (images.device, images.dtype, images.shape) == (META, torch.uint8, (3, 3, SIDE, SIDE))


@pytest.mark.parametrize("method", INPAINTING_METHODS)
@pytest.mark.parametrize(
    ("network", "latents", "canvas"),
    [("DDPM++", True, "extrapolate"), ("NCSN++", False, "windows"), ("ADM", False, "extrapolate")],
)
def test_sampling_of_every_network_around_a_centre_stays_on_its_device(
    network: str, latents: bool, canvas: str, method: str
) -> None:
    config = small_config(network, classes=5, channels=4 if latents else 3)
    model = meta_model(config, skeleton(config), latents)
    sampling = Sampling("euler", 2, size=(48, 64), canvas=canvas, guidance=1.3)
    mask = torch.zeros(48, 64, dtype=torch.bool)
    mask[16:32, 16:48] = True
    known = KnownPixels(torch.zeros(3, 48, 64, dtype=torch.uint8), mask, method)
    with OneDevice(META):
        images = generate(model, [0, 1], [0, 1], sampling, known)
    assert (images.device, images.shape) == (META, (2, 3, 48, 64))


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.ones(2, device=META) + torch.ones(2),
        lambda: torch.ones(2, device=META) * torch.ones(()),
        lambda: torch.ones(2).to(META),
        lambda: torch.empty(2, device=META).copy_(torch.ones(2)),
        lambda: torch.tensor([1.0], device=META),
        lambda: torch.linalg.inv(torch.empty(3, 3, device=META)),
        lambda: float(torch.ones((), device=META)),
        lambda: torch.ones(2, device=META)[torch.ones(2, dtype=torch.bool, device=META)],
    ],
    ids=["mixed", "mixed-scalar", "copy-to", "copy-into", "numbers", "checked-inverse", "read", "mask"],
)
def test_the_check_finds_stray_tensors_and_waits(work: Callable[[], object]) -> None:
    with OneDevice(META), pytest.raises(StrayOperation):
        work()


def test_the_check_allows_copies_that_do_not_wait_and_work_on_the_cpu() -> None:
    with OneDevice(META):
        assert float(torch.ones(2).sum()) == 2
        assert torch.ones(2).to(META, non_blocking=True).sum().device == META
