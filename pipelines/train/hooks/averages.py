"""Snapshots of power-function averages, from which other averages are made after training (EDM2, section 3.2)."""

from concurrent.futures import Future

from safetensors import SafetensorError

from patchloom.models.checkpoints import save_average
from patchloom.models.ema import PowerEMA
from patchloom.pipelines.train.hooks.hook import Due, Hook, is_due
from patchloom.platform.progress import say
from patchloom.platform.records.run import ProgressLine


class AverageHook(Hook):
    """Writes `ema/sigma-rel-0.1/step-00001000.safetensors`."""

    def save(self, due: Due, line: Future[ProgressLine | None]) -> None:
        """Write the snapshots that are due."""
        for average, settings in zip(self.run.state.emas, self.run.recipe.ema, strict=True):
            every = settings.snapshot_every_images
            if isinstance(average, PowerEMA) and every and (due.ends or is_due(self.run, every, due.plan)):
                self._save(average)

    def _save(self, average: PowerEMA) -> None:
        """Write a snapshot; training continues if that fails."""
        state = self.run.state
        folder = self.run.folder / "ema" / f"sigma-rel-{average.sigma_rel:g}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_average(folder / f"step-{state.step:08d}.safetensors", average, state.images_seen)
        except (OSError, SafetensorError) as error:
            say(f"  the average of step {state.step:,} was not written ({error}); training continues: free disk space")
