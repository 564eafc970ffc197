"""Training losses: the mean since the last line, by patch size and by noise level, and the check for divergence."""

import math
from collections.abc import Iterable

import torch

from patchloom.models.loss import SIGMA_BINS
from patchloom.models.step_plan import StepPlan
from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.pipelines.train.run import TrainingRun
from patchloom.platform.records.run import LineFields

# Times the lowest loss of an earlier line. Losses of single steps differ up to a hundredfold by patch size and noise.
DIVERGED_RATIO = 1000.0


class Divergence:
    """Whether a run has diverged: its loss is not finite, or far above the lowest one so far."""

    def __init__(self) -> None:
        self._lowest_loss = math.inf

    def shows_in(self, loss: float) -> bool:
        """Whether the next loss of the run shows it."""
        diverged = not math.isfinite(loss) or loss > DIVERGED_RATIO * self._lowest_loss
        self._lowest_loss = min(self._lowest_loss, loss)
        return diverged


class LossHook(Hook):
    """Adds the losses. They are summed on the device and read only when a line is written."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._divergence = Divergence()
        self.after_line()

    def after_line(self) -> None:
        """Reset the sums."""
        self._totals = torch.zeros_like(self.run.state.gradients.loss_and_crops)  # (patch sizes, sigma bins, 2)
        self._images_before = self.run.state.images_seen

    def after_step(self, plan: StepPlan) -> None:
        """Add the losses of the step, which are already summed over the workers."""
        self._totals += self.run.state.gradients.loss_and_crops

    def line_fields(self) -> LineFields:
        """Mean losses, and the number of crops whose loss was not finite."""
        totals = self._totals.double().cpu()
        losses, crops = totals.sum((0, 1)).tolist()
        loss = losses / crops if crops else math.nan
        self.has_diverged = self._divergence.shows_in(loss)
        seen = self.run.state.images_seen - self._images_before
        return {
            "loss": loss if math.isfinite(loss) else None,
            "loss_by_patch_size": _means(
                (str(size.pixels) for size in self.run.settings.schedule.sizes), totals.sum(1)
            ),
            "loss_by_sigma": _means(SIGMA_BINS, totals.sum(0)),
            "bad_crops": seen - round(float(totals[..., 1].sum())),
        }


def _means(names: Iterable[str], sums: torch.Tensor) -> dict[str, float]:
    """Means by name from (names, 2) sums and counts; names without a count are skipped."""
    return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True) if count}
