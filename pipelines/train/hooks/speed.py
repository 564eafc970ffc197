"""Speed: rates since the last line, what the time was spent on, memory, and the share of the peak FLOP/s."""

import resource
import time
from typing import Any

import torch

from patchloom.models.flops import peak_flops
from patchloom.models.patches import PatchSize
from patchloom.models.step import HALF_PRECISIONS
from patchloom.models.step_plan import StepPlan
from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.pipelines.train.run import TrainingRun
from patchloom.platform.records.run import LineFields


class SpeedHook(Hook):
    """Adds rates of all workers together, and the memory of worker 0."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._peak_flops, self._peak_source = _peak_of_all_workers(run)
        self.after_line()

    def after_line(self) -> None:
        """Start a new interval."""
        self._crops_before = list(self.run.state.crops_by_size)
        self._step_before = self.run.state.step
        self._marks: list[tuple[PatchSize | None, int, Any]] = [(None, 0, self.run.timer.mark())]
        self._start = time.perf_counter()

    def after_step(self, plan: StepPlan) -> None:
        """Note the end of the step, and its patch size if it has only one."""
        size = plan.sizes[0] if len(set(plan.sizes)) == 1 else None
        self._marks.append((size, plan.crops, self.run.timer.mark()))

    def line_fields(self) -> LineFields:
        """Rates of the interval. All workers must call this together."""
        waits = self._waits()
        state, run = self.run.state, self.run
        seconds = max(time.perf_counter() - self._start, 1e-9)
        steps = state.step - self._step_before
        crops = [now - before for now, before in zip(state.crops_by_size, self._crops_before, strict=True)]
        flops_per_second = run.flops_of(crops) / seconds
        fields: LineFields = {
            "images_per_second": sum(crops) / seconds,
            "updates_per_second": steps / seconds,
            "flops_per_second": flops_per_second,
            "images_per_second_by_patch_size": self._rates_by_size(),
            "data_wait_share": waits["data"] / seconds,
            "reduce_wait_share": waits["reduce"] / seconds,
            "straggler_loss": waits["straggler"] / seconds,
            "eta_seconds": (run.settings.updates - state.step) * seconds / max(steps, 1),
            "peak_memory_bytes": self._peak_memory(),
        }
        return fields | self._utilisation(flops_per_second)

    def _utilisation(self, flops_per_second: float) -> LineFields:
        """The share of the peak, and the peak; nothing where the peak is too low. All workers must call this together.

        A peak that was measured while the machine was busy can be below the rate of the run. It is measured again.
        """
        if self.run.worker.any(flops_per_second > self._peak_flops):
            peak, self._peak_source = _peak_of_all_workers(self.run)
            self._peak_flops = max(peak, self._peak_flops)
        if flops_per_second > self._peak_flops:
            return {}
        return {
            "model_flops_utilisation": flops_per_second / self._peak_flops,
            "peak_flops_per_second": self._peak_flops,
            "peak_flops_source": self._peak_source,
        }

    def _waits(self) -> dict[str, float]:
        """Seconds of the interval spent waiting. All workers must call this together.

        "reduce" is the time spent waiting for sums of gradients after the backward pass. "straggler" is the part spent
        waiting for the slowest worker of each step, as the mean over workers. The worker that arrived last waits for
        the sums alone.
        """
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)
        worker, of_buckets = self.run.worker, torch.tensor(self.run.timer.take("reduce"))
        own = of_buckets.view(-1, len(self.run.state.gradients.buckets)).sum(1)  # by step
        waits = torch.zeros(worker.count, len(own), device=self.run.device)
        waits[worker.rank] = own
        worker.reduce(waits)
        lost = (waits - waits.min(0).values).mean(0).sum()
        return {"data": sum(self.run.timer.take("data")), "reduce": float(own.sum()), "straggler": float(lost)}

    def _rates_by_size(self) -> dict[str, float]:
        """Crops per second of each patch size, over the steps with only one size."""
        spent: dict[str, list[float]] = {}
        for (_, _, before), (size, crops, now) in zip(self._marks, self._marks[1:], strict=False):
            seconds = self.run.timer.seconds_between(before, now)
            if size is not None:
                total = spent.setdefault(str(size.pixels), [0.0, 0.0])
                total[0] += crops
                total[1] += seconds
        return {name: crops / max(seconds, 1e-9) for name, (crops, seconds) in spent.items()}

    def _peak_memory(self) -> int:
        if self.run.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.run.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _peak_of_all_workers(run: TrainingRun) -> tuple[float, str]:
    """The sum of the workers' peak FLOP/s, and how worker 0's was found. All workers must call this together."""
    own, source = peak_flops(run.device, HALF_PRECISIONS.get(run.settings.precision, torch.float32))
    total = torch.tensor([own], device=run.device)
    run.worker.reduce(total)
    return float(total), source
