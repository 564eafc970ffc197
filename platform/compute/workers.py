"""Workers: processes of Ray Train that run one training loop together."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from patchloom.errors import UserError, WorkersFailed
from patchloom.platform.compute.devices import own_device, use_device
from patchloom.platform.compute.messages import is_in_worker
from patchloom.platform.compute.resources import (
    COLLECTIVE_MINUTES,
    DEFAULT_RESOURCES,
    Resources,
    WorkerShape,
    wait_for_workers,
)
from patchloom.platform.compute.session import (
    begin_work,
    check_cluster,
    environment_defaults,
    ray_session,
    session_cpus,
)
from patchloom.platform.compute.shared_paths import NO_PATHS, UsedPaths, check_shared
from patchloom.platform.compute.stopping import RunControl, call_here, call_until_stopped
from patchloom.platform.compute.supply import may_need_session, session_shape
from patchloom.platform.compute.versions import COMMAND, ProcessVersions, check_versions, own_versions
from patchloom.platform.compute.worker_log import WorkerLog
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Config = TypeVar("Config")
LoopResult = TypeVar("LoopResult")
Value = TypeVar("Value")

TIMED_OUT = ("timed out", "timeout")  # in the errors of gloo and NCCL
TRIAL_CPUS = 0.01  # reserved for the process of a trial that waits for its own workers


@dataclass(frozen=True)
class Worker:
    """One process of a training run.

    Args:
        rank: number of this worker, from 0.
        count: number of workers.
        loses_a_node: returns whether the cluster announced that it will take away a node of any worker. All workers
            must call it at the same step.
        node: number of its node, from 0.
        rank_on_node: number of this worker on its node, from 0.
        collective_minutes: the longest wait for another worker, for messages.
    """

    rank: int = 0
    count: int = 1
    loses_a_node: Callable[[], bool] = lambda: False
    node: int = 0
    rank_on_node: int = 0
    collective_minutes: float = COLLECTIVE_MINUTES

    @property
    def device(self) -> "torch.device":
        """The device of this worker, with its index."""
        return own_device()

    def reduce(self, tensor: "Tensor") -> None:
        """Sum a tensor over all workers, in place."""
        if self.count > 1:
            import torch.distributed

            with self._waiting():
                torch.distributed.all_reduce(tensor)

    def start_sum(self, tensor: "Tensor") -> Callable[[], object]:
        """Start to sum a tensor over several workers, in place; returns a function that waits for it.

        All workers must start their sums in the same order.
        """
        import torch.distributed

        work: Any = torch.distributed.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with self._waiting():
                work.wait()

        return wait

    def share(self, tensor: "Tensor") -> None:
        """Replace the values of a tensor by those of worker 0, in place. All workers must call it at the same step."""
        if self.count > 1:
            import torch.distributed

            values = tensor.contiguous()
            with self._waiting():
                torch.distributed.broadcast(values, 0)
            tensor.copy_(values)

    def gather(self, mine: Value) -> list[Value]:
        """The values of all workers by rank. All workers must call it at the same step."""
        if self.count == 1:
            return [mine]
        import torch.distributed

        values: list[Any] = [None] * self.count
        with self._waiting():
            torch.distributed.all_gather_object(values, mine)
        return values

    def any(self, mine: bool) -> bool:
        """Whether the value is true on any worker. All workers must call it at the same step."""
        if self.count == 1:
            return mine
        import torch

        votes = torch.tensor([float(mine)], device=self.device)
        self.reduce(votes)
        return votes.item() > 0

    def meet(self) -> None:
        """Wait until all workers are here."""
        self.any(False)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Say what it means that a collective operation timed out."""
        try:
            yield
        except RuntimeError as error:
            if not any(words in str(error).lower() for words in TIMED_OUT):
                raise
            raise WorkersFailed(
                f"worker {self.rank} waited for another worker for longer than {self.collective_minutes:g} minutes: "
                "one hangs, or the network between them fails; a slow cluster can wait longer with --resources "
                "collective_minutes=MINUTES"
            ) from error


def run_workers(
    loop: Callable[[Worker, Config], LoopResult],
    config: Config,
    workers: int,
    scratch: Path,
    name: str,
    control: RunControl,
    min_workers: int | None = None,
    resources: Resources = DEFAULT_RESOURCES,
    paths: UsedPaths = NO_PATHS,
) -> LoopResult:
    """Run `loop(worker, config)` on every worker. Workers that fail start again, as long as there is progress.

    Args:
        loop: the training loop.
        config: its configuration, which is pickled for the workers.
        workers: number of workers; 0 runs the loop in this process, without Ray.
        scratch: folder for the files of Ray Train, removed at the end.
        name: name of the run in Ray Train.
        control: how SIGTERM and a deadline stop the loop, and what counts as progress.
        min_workers: continue with fewer workers, down to this number, if nodes are lost, and with more when they
            return. None: always `workers`.
        resources: the nodes that the workers may use, and how long to wait for them.
        paths: local paths that all nodes must see.

    Returns:
        What the loop returned on rank 0.

    Raises:
        UserError: the cluster cannot have as many workers, or did not within the time, or a worker raised one.
        WorkersFailed: workers failed too often without a newer checkpoint.
        Stopped: SIGTERM arrived or the time was up, and the workers did not train or did not answer.
    """
    if workers == 0:
        begin_work()
        return call_here(lambda: loop(Worker(), config), control)
    # replacing a lost node may take minutes; an elastic run does not wait for it
    is_elastic = min_workers is not None and min_workers < workers
    defaults = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30" if is_elastic else "600",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else lines of `print` are twice in the logs of workers
    }
    with environment_defaults(defaults), ray_session(workers, resources.object_store_gib):
        least = min_workers or workers
        return call_until_stopped(
            lambda: _run_on_ray_train(loop, config, workers, least, scratch, name, control, resources, paths), control
        )


def _run_on_ray_train(
    loop: Callable[[Worker, Config], LoopResult],
    config: Config,
    workers: int,
    min_workers: int,
    scratch: Path,
    name: str,
    control: RunControl,
    resources: Resources,
    paths: UsedPaths,
) -> LoopResult:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer

    from patchloom.platform.compute.failures import MOST_FAILURES, FailureLimit, fit
    from patchloom.platform.compute.interfaces import torch_config
    from patchloom.platform.compute.worker_groups import CheckpointBeforeResize, GroupNotice

    shape, cpus = train_worker_shape(workers, resources, min_workers)
    if not is_in_worker():
        wait_for_workers(min_workers, shape, resources.wait_minutes)
        check_shared(paths)
        plural = "s" if workers > 1 else ""
        say(f"  waiting for {workers} worker{plural} of Ray Train with {shape} (half a minute on a laptop) ...")
    trainer = TorchTrainer(
        _on_worker(loop, cpus, own_versions(COMMAND), control.run, resources.collective_minutes),
        train_loop_config={"config": config},
        torch_config=torch_config(resources.collective_minutes),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if min_workers == workers else (min_workers, workers),
            use_gpu="GPU" in shape.bundle,
            resources_per_worker={name: amount for name, amount in shape.bundle.items() if ":" not in name},
            accelerator_type=resources.accelerator,
            label_selector=shape.labels or None,
            placement_strategy=shape.placement,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(scratch),
            # a lost spot node never counts; FailureLimit counts the other failures
            failure_config=ray.train.FailureConfig(max_failures=-1, controller_failure_limit=MOST_FAILURES),
            callbacks=[
                FailureLimit(control.newest_step, control.reset, control.run),
                CheckpointBeforeResize(control),
                GroupNotice(workers),
            ],
        ),
    )
    result: LoopResult = fit(trainer, control.newest_step)
    shutil.rmtree(scratch, ignore_errors=True)
    return result


@contextlib.contextmanager
def room_for_workers(
    workers: int, min_workers: int | None, resources: Resources, paths: UsedPaths
) -> Iterator[Resources]:
    """A session that has room for workers, before anything is written. On a cluster, waits for nodes.

    Yields:
        The resources, with the number of GPUs of each worker if it was decided.

    Raises:
        UserError: the cluster does not answer, cannot have as many workers, or did not within the time, or its nodes
            do not see the paths.
    """
    check_cluster()
    is_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if not workers or is_in_worker() or not (is_cluster or may_need_session(resources)):
        yield resources  # a session on this machine has room
        return
    _check_whole_gpus(resources)
    with ray_session(workers, resources.object_store_gib):
        least = min_workers or workers
        shape, _ = train_worker_shape(workers, resources, least)
        wait_for_workers(least, shape, resources.wait_minutes)
        check_shared(paths)
        yield resources.with_values(gpus_per_worker=shape.bundle.get("GPU", 0))


def train_worker_shape(
    workers: int, resources: Resources, min_workers: int | None = None, in_trial: bool | None = None
) -> tuple[WorkerShape, int]:
    """What one worker reserves, and the number of its threads.

    Args:
        workers: number of workers.
        resources: what the user chose.
        min_workers: how many must run at once. None: all.
        in_trial: whether they are those of a trial of a search. None: whether this process is one.

    Raises:
        UserError: the GPUs are a fraction, or the nodes can never have as many.
    """
    _check_whole_gpus(resources)
    in_trial = is_in_worker() if in_trial is None else in_trial
    own_session = not os.environ.get("RAY_ADDRESS") and not in_trial
    cpus = resources.cpus_per_worker or (max(1, session_cpus() // workers) if own_session else 1)
    reserved = cpus - TRIAL_CPUS if in_trial else cpus  # a trial shares the CPUs with other trials
    return session_shape(resources, reserved, min_workers or workers), cpus


def _check_whole_gpus(resources: Resources) -> None:
    gpus = resources.gpus_per_worker
    if gpus not in (None, 0, 1):
        raise UserError(f"--gpus {gpus:g}: a worker of a training run uses a whole GPU or none: choose 1 or 0")


def _on_worker(
    loop: Callable[[Worker, Config], LoopResult],
    cpus: int,
    versions: ProcessVersions,
    run: Folder | None,
    collective_minutes: float,
) -> Callable[[dict[str, Any]], LoopResult]:
    """The function that Ray Train calls on each worker."""

    def run_loop(settings: dict[str, Any]) -> LoopResult:
        begin_work()
        import ray.train
        import torch

        use_device(own_device())
        context = ray.train.get_context()
        check_versions([versions, own_versions(f"worker {context.get_world_rank()}")])
        if own_device().type == "cpu":
            torch.set_num_threads(cpus)
        worker = Worker(
            context.get_world_rank(),
            context.get_world_size(),
            lambda: ray.train.get_preemption_info() is not None,
            context.get_node_rank(),
            context.get_local_rank(),
            collective_minutes,
        )
        with WorkerLog(run, worker.rank, worker.count, str(worker.device)) if run else contextlib.nullcontext():
            return loop(worker, settings["config"])

    return run_loop
