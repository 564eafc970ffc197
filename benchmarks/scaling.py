"""Calculated scaling: steps on up to 1,024 GPUs for each draw of patch sizes, and the data that they read.

The run is the paper's largest: ADM on latents of 32, p = .5, float32 gradients that are summed in buckets during the
backward pass. The constants below are assumptions. A test compares `models/scaling.py` with measured steps of up to 4
workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.setups import adm_config
from patchloom.models.denoiser import build_denoiser
from patchloom.models.flops import PEAK_FLOPS, training_flops
from patchloom.models.gradients import FLOAT_BYTES, bucket_starts
from patchloom.models.patches import PatchSchedule, patch_schedule
from patchloom.models.scaling import Workers, images_per_second, step_seconds

GPUS = tuple(2**power for power in range(11))
SIDE, GPU_BATCH, PAPER_BATCH = 32, 64, 4096  # ImageNet-256's latents and batch
UTILISATION = 0.35  # share of the data sheet's bf16 FLOP/s: assumed, not measured
NODE_BYTES_PER_SECOND, NETWORK_BYTES_PER_SECOND = 450e9, 50e9  # one way: NVLink in a node, 400 Gbit/s between nodes
LATENCY_S = 5e-6
ROWS = 1_281_167  # in ImageNet
GPUS_PER_NODE = 8
STORE_BYTES_PER_SECOND = 1.25e9  # from an object store to one node: 10 Gbit/s
LATENT_BYTES = 2 * 2 * 4 * SIDE**2  # mean and std, float16
PIXEL_BYTES = 3 * 256**2


@dataclass(frozen=True)
class PatchSetting:
    """A ratio p of full-size steps, and the draw of the other sizes."""

    name: str
    p: float
    draw: str

    @property
    def schedule(self) -> PatchSchedule:
        """The sizes of Eq. 5."""
        return patch_schedule(SIDE, self.p)


SETTINGS = (PatchSetting("p = 1", 1.0, "shared"), PatchSetting("p = 0.5, shared", 0.5, "shared"),
            PatchSetting("p = 0.5, independent", 0.5, "independent"))  # fmt: skip


def ring(gpus: int) -> Workers:
    """A ring of GPUs that enters and leaves every node once."""
    return Workers(gpus, NODE_BYTES_PER_SECOND if gpus <= GPUS_PER_NODE else NETWORK_BYTES_PER_SECOND, LATENCY_S)


class StepCosts:
    """Seconds per crop of each size, and the bytes of the gradients."""

    def __init__(self) -> None:
        config = adm_config(SIDE)
        flops = PEAK_FLOPS["H100"] * UTILISATION
        sizes = SETTINGS[1].schedule.sizes
        self.seconds_of_crop = {size.pixels: training_flops(config, size.pixels) / flops for size in sizes}
        with torch.device("meta"):
            numels = [parameter.numel() for parameter in build_denoiser(config).parameters()]
        self.gradient_bytes = FLOAT_BYTES * sum(numels)
        self.buckets = len(bucket_starts(numels))

    def step(self, setting: PatchSetting, gpus: int, gpu_batch: int, *, overlaps: bool = True) -> float:
        """Seconds per step. Without `overlaps`, the gradients are summed after the backward pass."""
        return step_seconds(
            setting.schedule, setting.draw, gpu_batch, self.seconds_of_crop, self.gradient_bytes, ring(gpus),
            self.buckets if overlaps else 1,
        )  # fmt: skip

    def waiting_share(self, setting: PatchSetting, gpus: int, gpu_batch: int, *, overlaps: bool = True) -> float:
        """The share of a step that waits for the gradients of other GPUs."""
        alone = self.step(setting, 1, gpu_batch)
        return 1 - alone / self.step(setting, gpus, gpu_batch, overlaps=overlaps)

    def rate(self, setting: PatchSetting, gpus: int, gpu_batch: int) -> float:
        """Counted images per second of all GPUs."""
        return images_per_second(setting.schedule, gpu_batch, ring(gpus), self.step(setting, gpus, gpu_batch))


def up_to_1024_gpus(scale: Scale, say: Say) -> list[Finding]:
    """Counted images per second on 1 to 1,024 H100 GPUs, gains over p = 1, and the limits of the data path."""
    costs = StepCosts()
    found = []
    for gpus in (1, 8, 64, 1024):
        rates = {setting.name: costs.rate(setting, gpus, GPU_BATCH) for setting in SETTINGS}
        alone = {setting.name: gpus * costs.rate(setting, 1, GPU_BATCH) for setting in SETTINGS}
        for name, rate in rates.items():
            what = f"{gpus:,} GPU{'s' if gpus > 1 else ''}, {GPU_BATCH} images per GPU: {name}"
            found.append(Finding(what, exact(rate), "images/s", alone[name], "without communication"))
        for name, rate in list(rates.items())[1:]:
            found.append(Finding(f"  {name} over p = 1", exact(rate / rates["p = 1"]), "x per counted image"))
    for gpus in (64, 1024):
        share = PAPER_BATCH // gpus
        waits, waited = (
            100 * costs.waiting_share(SETTINGS[1], gpus, share, overlaps=overlaps) for overlaps in (True, False)
        )
        what = f"{gpus:,} GPUs, {share} images per GPU (the paper's batch of {PAPER_BATCH:,}): waiting for gradients"
        found.append(Finding(what, exact(waits), "% of a step", is_cost=True))
        found.append(Finding("  if summed after the backward pass", exact(waited), "% of a step", is_cost=True))
    return [*found, *_data(costs)]


def _data(costs: StepCosts) -> Iterator[Finding]:
    """The data of ImageNet: into the cache of each node once, and from there in every step."""
    for name, row in (("latents of 32", LATENT_BYTES), ("pixels of 256", PIXEL_BYTES)):
        size = ROWS * row
        yield Finding(f"ImageNet as {name}", exact(size / 2**30), "GiB")
        yield Finding("  copy into the cache of a node, once", exact(size / STORE_BYTES_PER_SECOND), "s", is_cost=True)
        yield Finding("  copy into the caches of 128 nodes", exact(128 * size / 2**40), "TiB")
    rate = costs.rate(SETTINGS[1], 1, GPU_BATCH)
    yield Finding("latents read per GPU at p = 0.5", exact(rate), "rows/s")
    yield Finding("  per node of 8 GPUs", exact(GPUS_PER_NODE * rate * LATENT_BYTES / 2**30), "GiB/s")
