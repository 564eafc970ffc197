"""The work of the GPU tests, for any device: a step, ten steps, and two processes that share them.

It imports torch only, and the method, so that the tests run where nothing else is installed.
"""

import datetime
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_networks import SIDE, small_config
from torch import Tensor, nn

from patchloom.benchmarks.launches import count_launches
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.gradients import StartSum
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import patch_schedule
from patchloom.models.step import (
    StoredRows,
    TrainingState,
    compile_network,
    new_state,
    set_rounding,
    training_step,
)
from patchloom.models.step_plan import StepSettings, plan_step

EPS = 1e-4  # of Adam: a smaller one turns the rounding of gradients near 0 into whole steps
TIMEOUT = datetime.timedelta(seconds=60)
CLASSES = 5


@dataclass(frozen=True)
class Work:
    """What a check trains: a network with every condition, on images that are a function of their number."""

    network: str = "DDPM++"
    precision: str = "fp32"
    draw: str = "stratified"
    batch: int = 16
    compiled: bool = False
    steps: int = 10

    def settings(self) -> StepSettings:
        """The settings of the steps."""
        return StepSettings(
            seed=5, schedule=patch_schedule(SIDE, 0.5), updates=100, batch_size=self.batch, block_size=4, lr=1e-3,
            lr_rampup_images=0, label_dropout=0.1, augmentation=0.12, draw=self.draw, precision=self.precision,
        )  # fmt: skip


def seeded_denoiser(network: str) -> Denoiser:
    """A denoiser whose layers all have weights that count: fresh ones end in layers of zeros."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        denoiser = build_denoiser(small_config(network, augmentation=True, classes=CLASSES))
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, 0.0, 0.1)
    return denoiser


def rows_of(crops: range, device: torch.device) -> StoredRows:
    """Images and labels of crops, each from its number in the run."""
    images = [torch.randint(0, 256, (3, SIDE, SIDE), generator=torch.Generator().manual_seed(n)) for n in crops]
    labels = torch.tensor([number % CLASSES for number in crops])
    return StoredRows(torch.stack(images).to(torch.uint8).to(device), labels.to(device))


def started(work: Work, device: torch.device) -> TrainingState:
    """The state before the first step."""
    set_rounding(work.precision)
    denoiser = seeded_denoiser(work.network).to(device).train()
    state = new_state(denoiser, [HalfLifeEMA(denoiser, 500)], work.settings(), (0.9, 0.999), EPS)
    if work.compiled:
        compile_network(denoiser, work.settings().schedule)
    return state


def prepared_step(
    state: TrainingState, work: Work, worker: int = 0, workers: int = 1, start_sum: StartSum | None = None
) -> Callable[[], None]:
    """The next step, with its rows already on the device."""
    settings, device = work.settings(), state.gradients.flat.device
    plan = plan_step(settings, state.step, state.images_seen)
    groups = plan.share(worker, workers)
    fetched = [(group, rows_of(group.crops, device)) for group in groups]
    return lambda: training_step(state, settings, plan, fetched, pixel_normalisation(), start_sum)


def take_step(state: TrainingState, work: Work, around: Callable[[], Any] = nullcontext, **sharing: Any) -> None:
    """Take one step; the step itself runs inside `around()`."""
    step = prepared_step(state, work, **sharing)
    with around():
        step()


def trained_weights(work: Work, device: torch.device, **sharing: Any) -> Tensor:
    """All weights after the steps, float64 on the CPU."""
    state = started(work, device)
    for _ in range(work.steps):
        take_step(state, work, **sharing)
    return flat_weights(state.denoiser)


def flat_weights(module: nn.Module) -> Tensor:
    """All parameters in one tensor, float64 on the CPU."""
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).double().cpu()


def distance(found: Tensor, wanted: Tensor) -> float:
    """The relative L2 distance of two tensors of one shape."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def summed_by_gloo(bucket: Tensor) -> Callable[[], object]:
    """Start to sum a part of the gradients over all processes."""
    work = dist.all_reduce(bucket, async_op=True)
    assert work is not None
    return work.wait


def train_in_a_process(rank: int, workers: int, work: Work, device: str, folder: str) -> None:
    """Train a share of every step, and let the first process write the weights to a file."""
    store = dist.FileStore(f"{folder}/store", workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers, timeout=TIMEOUT)
    try:
        weights = trained_weights(work, torch.device(device), worker=rank, workers=workers, start_sum=summed_by_gloo)
        if rank == 0:
            torch.save(weights, Path(folder) / "weights.pt")
    finally:
        dist.destroy_process_group()


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On a GPU, any wait of the host inside the block is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step_launches(works: Sequence[Work], device: torch.device) -> list[int]:
    """Kernels of a step of each work on a GPU; operations on the CPU."""
    pieces = {str(number): prepared_step(started(work, device), work) for number, work in enumerate(works)}
    return list(count_launches(pieces, device).values())
