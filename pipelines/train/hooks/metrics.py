"""Metrics: what Ray's metrics show of each worker, and of the run."""

from patchloom.models.step_plan import StepPlan
from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.platform.compute.metrics import UNSENT_FILES, metrics_are_on
from patchloom.platform.files.folder import is_remote
from patchloom.platform.files.journal import Journal
from patchloom.platform.records.run import LineFields


class MetricsHook(Hook):
    """Records the fields of each progress line."""

    def after_step(self, plan: StepPlan) -> None:
        """Note the step, whose crops the workers share as those of all steps."""
        self._plan = plan

    def publish(self, fields: LineFields) -> None:
        """Record what this worker measured, and on worker 0 also what holds for all."""
        if not metrics_are_on():
            return
        run, plan = self.run, self._plan
        share = sum(len(group.crops) for group in plan.share(run.worker.rank, run.worker.count)) / plan.crops
        run.metrics.record_worker(fields, share)
        if run.worker.rank == 0:
            run.metrics.record_line(fields, run.worker.count)
            if is_remote(run.job.address):
                run.metrics.record(UNSENT_FILES, len(Journal.read(run.folder).unsent(run.folder)))
