"""Checkpoints at the intervals of the recipe, at the end of a session, and before a node is lost."""

from concurrent.futures import Future

from patchloom.pipelines.train.checkpointer import Checkpointer
from patchloom.pipelines.train.hooks.hook import Due, Hook, is_due
from patchloom.pipelines.train.run import TrainingRun
from patchloom.platform.compute.metrics import CHECKPOINT_TIME, FAILED_CHECKPOINTS
from patchloom.platform.records.run import LineFields, ProgressLine


class CheckpointHook(Hook):
    """Writes `checkpoints/step-00001000/` in the background."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self.checkpointer = Checkpointer(run.folder, run.recipe.train.keep)

    def save(self, due: Due, line: Future[ProgressLine | None]) -> None:
        """Start to write a checkpoint if one is due."""
        if due.checkpoint_now or is_due(self.run, self.run.recipe.train.checkpoint_every_images, due.plan):
            self.checkpointer.save(self.run.state, self.run.recipe.name, line)

    def publish(self, fields: LineFields) -> None:
        """Record the newest checkpoint, and those that failed."""
        if self.run.worker.rank == 0:
            self.run.metrics.record(CHECKPOINT_TIME, self.checkpointer.written_unix_s)
            self.run.metrics.record(FAILED_CHECKPOINTS, self.checkpointer.failed)

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self.checkpointer.wait()
        self.publish({})
