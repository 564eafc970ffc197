"""Scaling on paper: steps on up to 1,024 GPUs, by how sizes are drawn, and the data that they need; all arithmetic.

The paper's largest run: ADM on latents of 32, p = .5, one flat all-reduce of float32 gradients that waits for the
backward pass. What is assumed stands below; the model itself (`models/scaling.py`) is held against 1, 2 and 4 workers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from patchloom.benchmarks.findings import Finding, Say, Scale, exactly
from patchloom.benchmarks.setups import adm_config
from patchloom.models.denoiser import build_denoiser
from patchloom.models.flops import PEAK_FLOPS, parameter_count, training_flops
from patchloom.models.patches import PatchSchedule, patch_schedule
from patchloom.models.scaling import Workers, images_per_second, step_seconds

GPUS = tuple(2**power for power in range(11))
SIDE, BATCH_OF_GPU, BATCH_OF_PAPER = 32, 64, 4096  # ImageNet-256's latents and batch
USED = 0.35  # of the data sheet's FLOP/s in bf16: assumed, not measured
NODE_BYTES_PER_SECOND, NETWORK_BYTES_PER_SECOND = 450e9, 50e9  # one way: NVLink within a node, 400 Gbit/s between two
LATENCY_S = 5e-6
ROWS = 1_281_167  # of ImageNet
GPUS_A_NODE = 8
STORE_BYTES_PER_SECOND = 1.25e9  # what a node reads from an object store: 10 Gbit/s
LATENT_BYTES = 2 * 2 * 4 * SIDE**2  # mean and std, float16
PIXEL_BYTES = 3 * 256**2


@dataclass(frozen=True)
class Way:
    """A ratio of full-size steps, and how the others' sizes are drawn."""

    name: str
    p: float
    draw: str

    @property
    def schedule(self) -> PatchSchedule:
        """Eq. 5's sizes."""
        return patch_schedule(SIDE, self.p)


WAYS = (Way("p = 1", 1.0, "shared"), Way("p = 0.5, shared", 0.5, "shared"),
        Way("p = 0.5, independent", 0.5, "independent"))  # fmt: skip


def ring(gpus: int) -> Workers:
    """So many GPUs in a ring that enters and leaves every node once."""
    return Workers(gpus, NODE_BYTES_PER_SECOND if gpus <= GPUS_A_NODE else NETWORK_BYTES_PER_SECOND, LATENCY_S)


class Costs:
    """What a crop of each size and the gradients cost."""

    def __init__(self) -> None:
        config = adm_config(SIDE)
        flops = PEAK_FLOPS["H100"] * USED
        sizes = WAYS[1].schedule.sizes
        self.seconds_of_crop = {size.pixels: training_flops(config, size.pixels) / flops for size in sizes}
        with torch.device("meta"):
            self.gradient_bytes = 4.0 * parameter_count(build_denoiser(config))

    def step(self, way: Way, gpus: int, batch_of_gpu: int) -> float:
        """Seconds of a step."""
        seconds, workers = self.seconds_of_crop, ring(gpus)
        return step_seconds(way.schedule, way.draw, batch_of_gpu, seconds, self.gradient_bytes, workers)

    def rate(self, way: Way, gpus: int, batch_of_gpu: int) -> float:
        """Counted images a second of all GPUs."""
        return images_per_second(way.schedule, batch_of_gpu, ring(gpus), self.step(way, gpus, batch_of_gpu))


def to_a_thousand(scale: Scale, say: Say) -> list[Finding]:
    """Counted images a second on 1 to 1,024 H100s, gains over p = 1, and where the data's limits lie."""
    costs = Costs()
    found = []
    for gpus in (1, 8, 64, 1024):
        rates = {way.name: costs.rate(way, gpus, BATCH_OF_GPU) for way in WAYS}
        alone = {way.name: gpus * costs.rate(way, 1, BATCH_OF_GPU) for way in WAYS}
        for name, rate in rates.items():
            what = f"{gpus:,} GPU{'s' if gpus > 1 else ''} of {BATCH_OF_GPU} images: {name}"
            found.append(Finding(what, exactly(rate), "images/s", alone[name], "GPUs alone"))
        for name, rate in list(rates.items())[1:]:
            found.append(Finding(f"  {name} over p = 1", exactly(rate / rates["p = 1"]), "x a counted image"))
    for gpus in (64, 1024):
        share = BATCH_OF_PAPER // gpus
        seconds = costs.step(WAYS[1], gpus, share)
        reduction = ring(gpus).reduce_seconds(costs.gradient_bytes)
        what = f"{gpus:,} GPUs of {share} images (the paper's batch of {BATCH_OF_PAPER:,}): all-reduce"
        found.append(Finding(what, exactly(100 * reduction / seconds), "% of a step"))
    return [*found, *_data(costs)]


def _data(costs: Costs) -> Iterator[Finding]:
    """What the data path must carry for ImageNet: into each node's cache once, and from there in every step."""
    for name, row in (("latents of 32", LATENT_BYTES), ("pixels of 256", PIXEL_BYTES)):
        size = ROWS * row
        yield Finding(f"ImageNet as {name}", exactly(size / 2**30), "GiB")
        yield Finding("  into a node's cache, once", exactly(size / STORE_BYTES_PER_SECOND), "s", is_cost=True)
        yield Finding("  into 128 nodes' caches, of the store", exactly(128 * size / 2**40), "TiB")
    rate = costs.rate(WAYS[1], 1, BATCH_OF_GPU)
    yield Finding("latents that a GPU reads at p = 0.5", exactly(rate), "rows/s")
    yield Finding("  bytes of a node of 8 GPUs", exactly(GPUS_A_NODE * rate * LATENT_BYTES / 2**30), "GiB/s")
