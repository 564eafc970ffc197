"""Monitor: what a run tells while it trains (lines, previews, the held-out loss), and when it must end."""

import math
import resource
import time
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from patchloom.models.autoencoder import load_autoencoder
from patchloom.models.checkpoints import SamplingModel, save_average
from patchloom.models.ema import PowerEMA
from patchloom.models.flops import peak_flops, training_flops
from patchloom.models.generate import Sampling, default_labels, generate
from patchloom.models.loss import SIGMA_BINS, held_out_loss
from patchloom.models.metrics import colour_layout, frechet_distance
from patchloom.models.patches import PatchSize
from patchloom.models.step import HALF_PRECISIONS, learning_rate, one_hot
from patchloom.models.step_plan import StepPlan
from patchloom.pipelines.pages.pictures import contact_sheet, save_png
from patchloom.pipelines.train.checkpointer import Checkpointer
from patchloom.pipelines.train.run import Run
from patchloom.platform.compute.machine import system_load
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say
from patchloom.platform.records.run import ProgressLine, read_progress, write_progress

HELD_OUT_IMAGES = 64
REFERENCE_IMAGES = 1024
SAMPLED_AT_ONCE = 64
STOP_FILE = ".stop"  # in the run folder: somebody asks for a checkpoint and an end
VOTE_EVERY_STEPS = 8  # several workers must agree on where to stop, and whether a node is about to go
DIVERGED = 1000.0  # times the lowest loss of a line; lines of single steps may differ a hundredfold by size and noise


class Monitor:
    """Watches a run after every step; `verdict` is "training" until it is "finished", "stopped" or "diverged".

    Losses gather on the device and are read only when a line is written, which all workers do at the same
    steps, so that they come to the same verdict. Only worker 0 writes.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.is_first = run, run.worker.rank == 0
        self.checkpointer = Checkpointer(run.folder, run.recipe.train.keep)
        self.verdict = "training" if run.state.step < run.method.updates else "finished"
        self.last_line: ProgressLine | None = None
        self._flops = [training_flops(run.card.denoiser, size.pixels) for size in run.method.schedule.sizes]
        self._peak_flops, self._peak_source = _peak_of_all(run)
        self._lowest_loss = math.inf
        self._is_noticed = False
        self._model: SamplingModel | None = None
        self._reference: torch.Tensor | None = None  # features of training rows
        if self.is_first:  # lines past the checkpoint are about to be written again
            kept = [line for line in read_progress(run.folder) if line.step <= run.state.step]
            write_progress(run.folder, kept)
            self.last_line = kept[-1] if kept else None
        self._begin_interval()

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpointer.wait()

    def after_step(self, plan: StepPlan) -> None:
        """Count the step, do what is due after it, and settle whether there is another."""
        self._totals += self.run.state.gradients.loss_and_crops
        self._marks.append((self._size_of(plan), plan.crops, self.run.clock.mark()))
        train, preview = self.run.recipe.train, self.run.recipe.preview
        if self.run.state.step == self.run.method.updates:
            self.verdict = "finished"
        elif self._asked_to_stop():
            self.verdict = "stopped"
        ends, leaves = self.verdict != "training", self._loses_a_node()
        looks = self.verdict == "finished" or self._due(preview.every_images, plan)
        measures = looks or self._due(train.held_out_every_images, plan)
        if ends or measures or self._due(train.log_every_images, plan):
            self._tell(looks, measures)
        if self.verdict != "diverged" and self.is_first:
            self._keep(plan, ends, leaves)

    def _due(self, every_images: int, plan: StepPlan) -> bool:
        seen = self.run.state.images_seen
        return every_images > 0 and seen // every_images > (seen - plan.crops) // every_images

    def _asked_to_stop(self) -> bool:
        worker = self.run.worker
        if worker.count > 1 and self.run.state.step % VOTE_EVERY_STEPS:
            return False
        return worker.any((self.run.folder / STOP_FILE).exists())

    def _loses_a_node(self) -> bool:
        """Once: a node will be taken away, and the run goes on elsewhere with what was kept before."""
        if self._is_noticed or self.run.state.step % VOTE_EVERY_STEPS:
            return False
        self._is_noticed = self.run.worker.loses_a_node()
        return self._is_noticed

    def _keep(self, plan: StepPlan, ends: bool, leaves: bool) -> None:
        """Averages and checkpoints that are due."""
        run = self.run
        for average, settings in zip(run.state.emas, run.recipe.ema, strict=True):
            every = settings.snapshot_every_images
            if isinstance(average, PowerEMA) and every and (ends or self._due(every, plan)):
                self._keep_average(average)
        if ends or leaves or self._due(run.recipe.train.checkpoint_every_images, plan):
            held_out_loss = self.last_line.held_out_loss if self.last_line else None
            self.checkpointer.save(run.state, run.recipe.name, held_out_loss)

    def _keep_average(self, average: PowerEMA) -> None:
        """`ema/sigma-rel-0.1/step-00001000.safetensors`; one that cannot be written is left out."""
        state = self.run.state
        folder = self.run.folder / "ema" / f"sigma-rel-{average.sigma_rel:g}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_average(folder / f"step-{state.step:08d}.safetensors", average, state.images_seen)
        except (OSError, SafetensorError) as error:
            say(f"  the average of step {state.step:,} was not kept ({error}); training goes on: free some space")

    def _begin_interval(self) -> None:
        """What is counted from line to line starts at nothing."""
        self._totals = torch.zeros_like(self.run.state.gradients.loss_and_crops)
        self._crops_before = list(self.run.state.crops_by_size)
        self._step_before = self.run.state.step
        self._marks: list[tuple[PatchSize | None, int, Any]] = [(None, 0, self.run.clock.mark())]
        self._began = time.perf_counter()

    def _tell(self, looks: bool, measures: bool) -> None:
        """Read what gathered, judge it, and write a line, with pictures and the held-out loss where they are due."""
        totals = self._totals.double().cpu()  # (patch sizes, sigma bins, 2)
        losses, crops = totals.sum((0, 1)).tolist()
        loss = losses / crops if crops else math.nan
        if not math.isfinite(loss) or loss > DIVERGED * self._lowest_loss:
            self.verdict = "diverged"
        self._lowest_loss = min(self._lowest_loss, loss)
        waits = self._waits()
        if self.is_first:
            line = {**self._counts(), **self._losses(totals, loss), **self._speed(waits), "system": system_load()}
            if self.verdict != "diverged":
                line |= (self._previewed() if looks else {}) | (self._held_out() if measures else {})
            line["time_unix_s"] = time.time()
            self.last_line = ProgressLine.model_validate(line)
            self.last_line.append_to(self.run.folder)
        self._begin_interval()

    def _counts(self) -> dict[str, Any]:
        state, sizes = self.run.state, self.run.method.schedule.sizes
        full = sizes[0].pixels
        return {
            "step": state.step,
            "updates": state.step,
            "images_seen": state.images_seen,
            "full_size_images": state.crops_by_size[0],
            "pixel_equivalent_images": sum(
                n * (size.pixels / full) ** 2 for n, size in zip(state.crops_by_size, sizes, strict=True)
            ),
            "flops": sum(n * flops for n, flops in zip(state.crops_by_size, self._flops, strict=True)),
            "learning_rate": learning_rate(self.run.method, state.images_seen),
        }

    def _losses(self, totals: torch.Tensor, loss: float) -> dict[str, Any]:
        sizes = [str(size.pixels) for size in self.run.method.schedule.sizes]
        seen = self.run.state.images_seen - sum(self._crops_before)
        return {
            "loss": loss if math.isfinite(loss) else None,
            "loss_by_patch_size": _means(sizes, totals.sum(1)),
            "loss_by_sigma": _means(SIGMA_BINS, totals.sum(0)),
            "bad_crops": seen - round(float(totals[..., 1].sum())),  # whose loss was no number
        }

    def _waits(self) -> dict[str, float]:
        """Seconds of the interval that went into waiting; all workers must ask.

        Straggler loss is what waiting for the slowest worker of each step cost, as the mean over workers;
        the rest of the wait is the all-reduce itself, as long as that of the worker who came last.
        """
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        worker, mine = self.run.worker, self.run.clock.take("reduce")
        waits = torch.zeros(worker.count, len(mine), device=self.run.device)
        waits[worker.rank] = torch.tensor(mine)
        worker.reduce(waits)
        lost = (waits - waits.min(0).values).mean(0).sum() if mine else torch.zeros(())
        return {"data": sum(self.run.clock.take("data")), "reduce": sum(mine), "straggler": float(lost)}

    def _speed(self, waits: dict[str, float]) -> dict[str, Any]:
        """Rates of the interval; seconds of single sizes only where steps have one."""
        state, method = self.run.state, self.run.method
        seconds = max(time.perf_counter() - self._began, 1e-9)
        steps = state.step - self._step_before
        changes = [now - before for now, before in zip(state.crops_by_size, self._crops_before, strict=True)]
        flops_per_second = sum(n * flops for n, flops in zip(changes, self._flops, strict=True)) / seconds
        return {
            "images_per_second": sum(changes) / seconds,
            "updates_per_second": steps / seconds,
            "flops_per_second": flops_per_second,
            "images_per_second_by_patch_size": self._rates_by_size(),
            "data_wait_share": waits["data"] / seconds,
            "reduce_wait_share": waits["reduce"] / seconds,
            "straggler_loss": waits["straggler"] / seconds,
            "eta_seconds": (method.updates - state.step) * seconds / max(steps, 1),
            "peak_memory_bytes": self._peak_memory(),
            "model_flops_utilisation": flops_per_second / self._peak_flops,
            "peak_flops_per_second": self._peak_flops,
            "peak_flops_source": self._peak_source,
        }

    @staticmethod
    def _size_of(plan: StepPlan) -> PatchSize | None:
        """The size of a step that has one."""
        return plan.sizes[0] if len(set(plan.sizes)) == 1 else None

    def _rates_by_size(self) -> dict[str, float]:
        spent: dict[str, list[float]] = {}
        for (_, _, before), (size, crops, now) in zip(self._marks, self._marks[1:], strict=False):
            seconds = self.run.clock.seconds_between(before, now)
            if size is not None:
                total = spent.setdefault(str(size.pixels), [0.0, 0.0])
                total[0] += crops
                total[1] += seconds
        return {name: crops / max(seconds, 1e-9) for name, (crops, seconds) in spent.items()}

    def _peak_memory(self) -> int:
        if self.run.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _previewed(self) -> dict[str, Any]:
        """A grid of the averaged weights' samples, and perhaps their distance."""
        preview = self.run.recipe.preview
        if not preview.every_images:
            return {}
        previewed: dict[str, Any] = {"preview": self._preview()}
        if preview.frechet_samples:
            previewed["preview_frechet_distance"] = self._frechet_distance(preview.frechet_samples)
        return previewed

    def _preview(self) -> str:
        name = f"previews/step-{self.run.state.step:08d}.png"
        save_png(contact_sheet(self._sampled(self.run.recipe.preview.count).numpy()), self.run.folder / name)
        return name

    def _sampled(self, count: int) -> torch.Tensor:
        """(count, C, H, W) uint8 images of the averaged weights, from the seeds 0, 1, ..."""
        steps, images = Sampling(steps=self.run.recipe.preview.steps), []
        for start in range(0, count, SAMPLED_AT_ONCE):
            seeds = list(range(start, min(start + SAMPLED_AT_ONCE, count)))
            labels = default_labels(seeds, self._sampler().denoiser.classes)
            images.append(generate(self._sampler(), seeds, labels, steps).cpu())
        return torch.cat(images)

    def _sampler(self) -> SamplingModel:
        """The averaged weights as a model; an autoencoder is loaded when pictures are first asked for."""
        if self._model is None:
            run, autoencoder = self.run, None
            if run.space.kind == "latents":
                autoencoder = load_autoencoder(run.reader.dataset.path / "autoencoder", run.device)
            average: Any = run.state.emas[0].module
            self._model = SamplingModel(average, run.space, autoencoder, run.card)
        return self._model

    def _frechet_distance(self, count: int) -> float:
        """Of samples to as many training rows or more, on mean tile colours; for a run's own curve, not for tables."""
        if self._reference is None:
            train, model = self.run.reader.train, self._sampler()
            spread = np.linspace(0, len(train) - 1, min(len(train), max(count, REFERENCE_IMAGES))).astype(int)
            features = []
            for start in range(0, len(spread), SAMPLED_AT_ONCE):
                stored = self.run.reader.at(train[spread[start : start + SAMPLED_AT_ONCE]]).image
                images = stored if model.autoencoder is None else model.autoencoder.decode(stored)
                features.append(colour_layout(images.cpu()))
            self._reference = torch.cat(features)
        return frechet_distance(colour_layout(self._sampled(count)), self._reference)

    def _held_out(self) -> dict[str, Any]:
        """The averaged weights' loss on full-size held-out images, as a mean and by noise level."""
        run = self.run
        indices = run.reader.held_out
        if not len(indices):
            return {}
        spread = np.linspace(0, len(indices) - 1, min(HELD_OUT_IMAGES, len(indices))).astype(int)
        rows = run.reader.at(indices[spread])
        denoiser: Any = run.state.emas[0].module
        labels = one_hot(rows.label, denoiser.classes) if denoiser.classes else None
        by_sigma = held_out_loss(denoiser, run.space.normalise(rows.image), labels)
        return {
            "held_out_loss": sum(by_sigma.values()) / len(by_sigma),
            "held_out_loss_by_sigma": {f"{sigma:g}": loss for sigma, loss in by_sigma.items()},
        }


def _peak_of_all(run: Run) -> tuple[float, str]:
    """The FLOP/s that all workers' devices have together, and where worker 0's are from; all must ask at once."""
    mine, source = peak_flops(run.device, HALF_PRECISIONS.get(run.method.precision, torch.float32))
    total = torch.tensor([mine], device=run.device)
    run.worker.reduce(total)
    return float(total), source


def _means(names: Any, sums: torch.Tensor) -> dict[str, float]:
    """Means by name from (names, 2) sums and counts, where there was anything."""
    return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True) if count}


def ask_to_stop(folder: Folder) -> None:
    """Let every worker of the run in `folder` leave at its next step, with a checkpoint."""
    folder.write(STOP_FILE, "")
