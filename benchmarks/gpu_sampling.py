"""Sampling on one GPU: `generate` as `patchloom sample` calls it, compared with a plain loop."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from patchloom.benchmarks.findings import Finding, Scale, exact
from patchloom.benchmarks.gpu_session import GpuSession, PeakMemory
from patchloom.benchmarks.gpu_training import FASTEST_EAGER, PLAIN, Variant
from patchloom.benchmarks.interleaved import Work, interleave
from patchloom.benchmarks.plain import PlainDenoiser, plain_heun
from patchloom.benchmarks.setups import plain_copy, sampling_flops, untrained
from patchloom.models.cards import DenoiserConfig
from patchloom.models.checkpoints import SamplingModel, load_sampling_model, sampling_skeleton
from patchloom.models.denoiser import to_channels_last
from patchloom.models.generate import Sampling, generate
from patchloom.models.memory import sampling_bytes, weight_bytes
from patchloom.models.precision import fixed_arithmetic
from patchloom.models.replay import ReplayedNetwork
from patchloom.models.step import set_rounding
from patchloom.pipelines.sample.batches import default_batch

PLAIN_BATCH = 8
STEPS, TINY_STEPS = 18, 3  # of Heun
ROUNDS = 2  # a batch in fp32 takes seconds
ONE_BY_ONE = Variant("bf16, kernels launched one by one", "bf16")  # all others replay CUDA graphs
SAMPLING_VARIANTS = (Variant("fp32"), Variant("bf16", "bf16"), ONE_BY_ONE, FASTEST_EAGER)


@dataclass(frozen=True)
class UntrainedModel:
    """A pixel model with random weights on the device: as `sample` loads it, and the plain loop's network.

    Args:
        ours: the model.
        plain: the same weights in plain modules.
        folder: the model folder.
    """

    ours: SamplingModel
    plain: PlainDenoiser
    folder: Path

    @staticmethod
    def new(config: DenoiserConfig, folder: Path, device: torch.device) -> "UntrainedModel":
        """Draw the weights, and write the model to a new folder below `folder`."""
        path = untrained(folder / "model", replace(config, network_options={**config.network_options, "dropout": 0.0}))
        model = load_sampling_model(path, device)
        return UntrainedModel(model, plain_copy(model), path)

    def of(self, variant: Variant) -> SamplingModel:
        """The model in the layout of a variant."""
        if variant == ONE_BY_ONE:
            return replace(self.ours, replayed=None)
        if not variant.channels_last:
            return self.ours
        denoiser = copy.deepcopy(self.ours.denoiser)
        to_channels_last(denoiser)
        return replace(self.ours, denoiser=denoiser, replayed=self.ours.replayed and ReplayedNetwork(denoiser))


def sampling_speeds(session: GpuSession, name: str, config: DenoiserConfig, scale: Scale) -> None:
    """Images per second of each precision, in the batch that `sample` chooses for this GPU."""
    device, steps = session.device, TINY_STEPS if session.is_tiny else STEPS
    memory_bytes = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        models = UntrainedModel.new(config, Path(folder), device)
        samplings = {variant.name: Sampling(steps=steps, precision=variant.precision) for variant in SAMPLING_VARIANTS}
        batches = {each: default_batch(models.folder, sampling, device.type, memory_bytes)
                   for each, sampling in samplings.items()}  # fmt: skip
        skeleton = sampling_skeleton(models.folder)
    alternatives: dict[str, Work] = {PLAIN: plain_batch(models.plain, config, device, steps)}
    plain_batch(models.plain, config, device, 2)()
    memory: list[Finding] = []
    for variant in SAMPLING_VARIANTS:
        model, sampling, batch = models.of(variant), samplings[variant.name], batches[variant.name]
        estimate = sampling_bytes(skeleton, sampling, batch, device.type)
        memory += _memory_findings(f"{variant.name}, batch {batch}", model, batch, sampling, estimate)
        alternatives[variant.name] = partial(generated_batch, model, batch, sampling)
    timings, flops = interleave(alternatives, min(ROUNDS, scale.rounds), 0), sampling_flops(config, sampling)
    rates: list[Finding] = []
    for variant in (Variant(PLAIN), *SAMPLING_VARIANTS):
        what = f"{variant.name}, batch {batches.get(variant.name, PLAIN_BATCH)}"
        rates += session.rate(what, timings.rate(variant.name), flops, variant.precision)
    ratios = [Finding(f"{each.name} over {PLAIN}", timings.ratio(each.name, PLAIN), "x") for each in SAMPLING_VARIANTS]
    gain = timings.ratio("bf16", ONE_BY_ONE.name)
    ratios.append(Finding("bf16, CUDA graphs over one by one", gain, "x"))
    session.keep(f"{name}: sampling with {steps} steps of Heun", [*rates, *ratios, *memory])


def _memory_findings(
    what: str, model: SamplingModel, batch: int, sampling: Sampling, estimate_bytes: int
) -> list[Finding]:
    """The peak memory of sampling, with the weights, and its estimate; it is also the first batch of this model."""
    with PeakMemory(next(model.denoiser.parameters()).device) as peak:
        generated_batch(model, batch, replace(sampling, steps=2))
    return [
        Finding(f"peak memory, {what}", exact(peak.gib + weight_bytes(model) / 2**30), "GiB", is_cost=True),
        Finding("  as `sample` estimates it", exact(estimate_bytes / 2**30), "GiB", is_cost=True),
    ]


def generated_batch(model: SamplingModel, batch: int, sampling: Sampling) -> int:
    """Sample one batch with the arithmetic of `patchloom sample`. Returns the number of images."""
    with fixed_arithmetic():
        return len(generate(model, list(range(batch)), [-1] * batch, sampling).cpu())


def plain_batch(plain: PlainDenoiser, config: DenoiserConfig, device: torch.device, steps: int) -> Callable[[], int]:
    """A plain loop over one batch, in float32 without TF32."""
    shape = (PLAIN_BATCH, config.channels, config.resolution, config.resolution)

    def sample() -> int:
        set_rounding("fp32")
        return len(plain_heun(plain, torch.randn(shape, device=device), steps).cpu())

    return sample
