"""The monitor of a run: it calls the hooks after each step, writes the progress lines and decides when to stop."""

import time
from contextlib import ExitStack
from enum import StrEnum
from functools import partial

from patchloom.models.step_plan import StepPlan
from patchloom.pipelines.train.control import GO_ON, VOTE_EVERY_STEPS, requested
from patchloom.pipelines.train.hooks import HOOKS
from patchloom.pipelines.train.hooks.hook import Due, is_due, side_product
from patchloom.pipelines.train.progress_log import LineWriter, ProgressLog
from patchloom.pipelines.train.run import TrainingRun
from patchloom.pipelines.train.snapshot import Snapshot
from patchloom.platform.records.run import LineFields, ProgressLine


class Verdict(StrEnum):
    """What a run is doing, or why it ended."""

    TRAINING = "training"
    FINISHED = "finished"
    STOPPED = "stopped"
    DIVERGED = "diverged"


class Monitor:
    """Watches a run after each step. All workers reach the same verdict; only worker 0 writes files."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.hooks = [hook(run) for hook in HOOKS]
        self.measures_in_background = run.worker.count > 1  # a worker alone would only share its own processor
        self.lines: LineWriter | None = None
        if run.worker.rank == 0:
            self.lines = LineWriter(ProgressLog(run.folder, run.state.step), self.measures_in_background)
        self.verdict = Verdict.TRAINING if run.state.step < run.settings.updates else Verdict.FINISHED
        self._node_notice_seen = False

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: object) -> None:
        with ExitStack() as stack:  # closes the lines first, then the hooks, also after an error of one
            for hook in reversed(self.hooks):
                stack.callback(hook.close)
            if self.lines:
                stack.callback(self.lines.close)

    @property
    def last_line(self) -> ProgressLine | None:
        """The newest progress line, on worker 0. Waits for it."""
        return self.lines.newest.result() if self.lines else None

    def after_step(self, plan: StepPlan) -> None:
        """Count the step, write what is due after it, and set the verdict."""
        for hook in self.hooks:
            hook.after_step(plan)
        due = self._due(plan)
        if due.line:
            self._write_line(due)
        if self.lines and self.verdict != Verdict.DIVERGED:
            for hook in self.hooks:
                hook.save(due, self.lines.newest)

    def _due(self, plan: StepPlan) -> Due:
        train, preview = self.run.recipe.train, self.run.recipe.preview
        if self.run.state.step == self.run.settings.updates:
            self.verdict = Verdict.FINISHED
        request = requested(self.run.worker, self.run.folder, self.run.state.step)
        if request == "" and self.verdict == Verdict.TRAINING:
            self.verdict = Verdict.STOPPED
        ends, node_leaves = self.verdict != Verdict.TRAINING, self._loses_a_node()
        previews = self.verdict == Verdict.FINISHED or is_due(self.run, preview.every_images, plan)
        held_out = previews or is_due(self.run, train.held_out_every_images, plan)
        line = ends or held_out or is_due(self.run, train.log_every_images, plan)
        return Due(plan, line, held_out, previews, checkpoint_now=ends or node_leaves or request == GO_ON, ends=ends)

    def _loses_a_node(self) -> bool:
        """Whether a node will be lost; true once. The run then continues elsewhere from the checkpoint."""
        if self._node_notice_seen or self.run.state.step % VOTE_EVERY_STEPS:
            return False
        self._node_notice_seen = self.run.worker.loses_a_node()
        return self._node_notice_seen

    def _write_line(self, due: Due) -> None:
        fields: LineFields = {}
        for hook in self.hooks:
            fields |= hook.line_fields()
        if any(hook.has_diverged for hook in self.hooks):
            self.verdict = Verdict.DIVERGED
        if self.lines:
            fields["time_unix_s"] = time.time()
            snapshot = self._snapshot() if due.held_out and self.verdict != Verdict.DIVERGED else None
            self.lines.write(partial(self._complete, fields, due, snapshot))
        for hook in self.hooks:
            if not self.lines:
                hook.publish(fields)
            hook.after_line()

    def _snapshot(self) -> Snapshot:
        """The weights to measure. Waits for the previous measurement, so that there is at most one copy."""
        if self.lines:
            self.lines.wait()
        return Snapshot(self.run, is_copied=self.measures_in_background)

    def _complete(self, fields: LineFields, due: Due, snapshot: Snapshot | None) -> LineFields:
        """Add the measured fields of a line on worker 0, and publish all of them."""
        if snapshot is not None:
            for hook in self.hooks:
                with side_product(hook.product), snapshot.in_use():
                    fields |= hook.measure(due, snapshot)
        for hook in self.hooks:
            hook.publish(fields)
        return fields
