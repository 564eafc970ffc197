"""Checkpoints at the intervals of the recipe, at the end of a session, and before a node is lost."""

from patchloom.pipelines.train.checkpointer import Checkpointer
from patchloom.pipelines.train.hooks.hook import Due, Hook, is_due
from patchloom.pipelines.train.run import TrainingRun
from patchloom.platform.records.run import ProgressLine


class CheckpointHook(Hook):
    """Writes `checkpoints/step-00001000/` in the background."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self.checkpointer = Checkpointer(run.folder, run.recipe.train.keep)

    def save(self, due: Due, line: ProgressLine | None) -> None:
        """Start to write a checkpoint if one is due."""
        if due.checkpoint_now or is_due(self.run, self.run.recipe.train.checkpoint_every_images, due.plan):
            self.checkpointer.save(self.run.state, self.run.recipe.name, line.held_out_loss if line else None)

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self.checkpointer.wait()
