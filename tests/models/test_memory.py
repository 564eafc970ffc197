"""The estimated memory is within 15 % of the peak of live bytes that torch's tracker and a counter of ours see."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sampling_models import pixel_model
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker

from patchloom.models.autoencoder import DiffusersAutoencoder, new_autoencoder
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.cost import largest_group
from patchloom.models.denoiser import build_denoiser, skeleton
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.generate import Sampling, generate
from patchloom.models.inpainting import KnownPixels
from patchloom.models.memory import LiveBytes, largest_batch, sampling_bytes, training_bytes
from patchloom.models.normalisation import Normalisation, pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

CPU = torch.device("cpu")


class Work(torch.nn.Module):
    """The tracker counts repeated calls of a network only inside another module."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        super().__init__()
        self.work = work

    def forward(self, _: Tensor) -> Tensor:
        return self.work()


def tracked_peak(work: Callable[[], Tensor], model: SamplingModel) -> int:
    """The peak of live bytes that torch's tracker counts. It needs weights with gradients."""
    tracker = MemTracker()
    tracker.track_external(model.denoiser)
    if isinstance(model.autoencoder, DiffusersAutoencoder):
        tracker.track_external(model.autoencoder.network)
    with tracker:
        Work(work)(torch.zeros(1))
    return int(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


def latent_model(config: DenoiserConfig, device: str) -> SamplingModel:
    with torch.device(device):
        coder = DiffusersAutoencoder(new_autoencoder((16, 32), config.channels).eval())
    normalisation = Normalisation("latents", (0.0,) * config.channels, (1.0,) * config.channels)
    denoiser = skeleton(config) if device == "meta" else build_denoiser(config)
    return SamplingModel(
        denoiser.eval(),
        normalisation,
        coder,
        ModelCard(denoiser=config, normalisation=normalisation),
    )


@pytest.mark.parametrize(("precision", "guidance", "batch"), [("fp32", 1.0, 8), ("bf16", 1.3, 3)])
@pytest.mark.parametrize("network", ["song", "ncsn", "dhariwal", "latents"])
def test_sampling_needs_what_is_estimated(
    network: str, precision: str, guidance: float, batch: int, tiny_config: Callable[..., DenoiserConfig]
) -> None:
    options = {"width": 32, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
    ncsn = {"embedding": "fourier", "residual_input": True, "filter_taps": [1, 3, 3, 1]} if network == "ncsn" else {}
    kind = "dhariwal" if network == "dhariwal" else "song"
    sampling = Sampling(steps=2, guidance=guidance, precision=precision)
    if network == "latents":
        config = tiny_config(network_options=options, classes=3, channels=4)
        real, empty = latent_model(config, "cpu"), latent_model(config, "meta")
    else:
        config = tiny_config(network=kind, network_options=options | ncsn, classes=3)
        real, empty = (pixel_model(made(config).eval()) for made in (build_denoiser, skeleton))
    peak = tracked_peak(lambda: generate(real, list(range(batch)), [0] * batch, sampling), real)
    assert sampling_bytes(empty, sampling, batch, "cpu") == pytest.approx(peak, rel=0.15)


def test_gradients_of_reconstruction_need_what_is_estimated(tiny_config: Callable[..., DenoiserConfig]) -> None:
    options = {"width": 32, "width_multipliers": [1, 2], "blocks": 1, "attention": [8]}
    config, sampling = tiny_config(network="song", network_options=options), Sampling(steps=2)
    real, empty = (pixel_model(made(config).eval()) for made in (build_denoiser, skeleton))
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    known = KnownPixels(torch.zeros(3, 16, 16, dtype=torch.uint8), mask, "reconstruct")
    weights = sum(parameter.nbytes for parameter in real.denoiser.parameters())
    with LiveBytes() as live:
        generate(real, list(range(8)), [-1] * 8, sampling, known)
    estimated = sampling_bytes(empty, sampling, 8, "cpu", with_gradients=True)
    assert estimated == pytest.approx(weights + live.peak, rel=0.15)
    assert estimated > 2 * sampling_bytes(empty, sampling, 8, "cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("network", "draw", "batch"), [("song", "shared", 16), ("dhariwal", "stratified", 32)])
def test_training_needs_what_is_estimated(
    network: str, draw: str, batch: int, precision: str, tiny_config: Callable[..., DenoiserConfig]
) -> None:
    options = {"width": 32, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.1}
    config = tiny_config(network=network, network_options=options, classes=3)
    settings = StepSettings(
        seed=5, schedule=patch_schedule(16, 0.5), updates=99, batch_size=batch, block_size=4, lr=1e-3,
        lr_rampup_images=1, label_dropout=0.1, precision=precision, draw=draw,
    )  # fmt: skip
    denoiser = build_denoiser(config).train()
    state, peak = new_state(denoiser, [HalfLifeEMA(denoiser, 50.0)], settings, (0.9, 0.999), 1e-8), 0
    for _ in range(5):
        plan = plan_step(settings, state.step, state.images_seen)
        images = [torch.zeros(len(group.crops), 3, 16, 16) for group in plan.share()]
        work = [
            (group, StoredRows(image, torch.zeros(len(image))))
            for group, image in zip(plan.share(), images, strict=True)
        ]
        with LiveBytes() as live:
            training_step(state, settings, plan, work, pixel_normalisation(), lambda _: None)
        if state.step > 1:  # the first one makes the state of the optimiser
            peak = max(peak, live.peak)
    weights = sum(parameter.nbytes for parameter in denoiser.parameters())
    estimated = training_bytes(config, settings, largest_group(settings), "cpu", False)
    assert estimated == pytest.approx(peak, rel=0.15)
    assert estimated + 5 * weights == pytest.approx(peak + 5 * weights, rel=0.15)


def test_half_precision_of_gpus_normalises_in_float32(tiny_config: Callable[..., DenoiserConfig]) -> None:
    settings = StepSettings(
        seed=5, schedule=patch_schedule(16, 1.0), updates=9, batch_size=16, block_size=4, lr=1e-3, lr_rampup_images=1
    )
    full, cpu, gpu = (
        training_bytes(tiny_config(), replace(settings, precision=precision), largest_group(settings), device, False)
        for precision, device in (("fp32", "cuda"), ("bf16", "cpu"), ("bf16", "cuda"))
    )
    assert cpu < gpu < full


def test_live_bytes_are_counted_by_storage() -> None:
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[10:]
        second = first + 1
        del first
        assert live.now == 8000  # the view keeps the first storage
        del view
        assert live.now == 4000
        second.add_(1)
        torch.empty(250)
    assert (live.now, live.peak) == (4000, 8000)


@pytest.mark.parametrize(("limit", "batch"), [(0, 8), (159, 8), (160, 16), (639, 32), (10**9, 64)])
def test_the_largest_batch_within_a_limit(limit: int, batch: int) -> None:
    assert largest_batch(limit, lambda images: 10 * images, 8, 64) == batch
