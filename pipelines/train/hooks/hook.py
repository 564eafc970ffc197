"""The base class of hooks: what is done after the steps of a run, and what its progress lines contain."""

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from patchloom.models.step_plan import StepPlan
from patchloom.pipelines.train.run import TrainingRun
from patchloom.pipelines.train.snapshot import Snapshot
from patchloom.platform.progress import say
from patchloom.platform.records.run import LineFields, ProgressLine


@dataclass(frozen=True)
class Due:
    """What is due after a step. All workers have the same values.

    Args:
        plan: the step that was taken.
        line: write a progress line.
        held_out: measure on held-out images.
        preview: sample preview images.
        checkpoint_now: write a checkpoint, because the run ends or a node will be lost.
        ends: this was the last step of this session.
    """

    plan: StepPlan
    line: bool
    held_out: bool
    preview: bool
    checkpoint_now: bool
    ends: bool


@contextmanager
def side_product(name: str) -> Iterator[None]:
    """Report an error of the block and go on: what only shows the progress must not end a run."""
    try:
        yield
    except Exception as error:  # of the network, the metric, the autoencoder or the disk
        say(f"  {name} failed ({' '.join(str(error).split()) or type(error).__name__}); training continues")


class Hook:
    """A part of the monitor. A subclass overrides the methods that it needs.

    The monitor calls each method for all hooks, in the order of `hooks.HOOKS`. `after_step`, `line_fields` and
    `after_line` run on every worker, so they may reduce tensors over the workers. `publish` runs on every worker, on
    worker 0 after `measure`. `measure` and `save` run on worker 0 only. With several workers, `measure` and the
    `publish` of worker 0 run in a thread while training goes on.
    """

    product = "a measurement"  # what `measure` makes, for messages
    has_diverged = False  # a hook sets this in `line_fields` to end the run, with the same value on all workers

    def __init__(self, run: TrainingRun) -> None:
        self.run = run

    def after_step(self, plan: StepPlan) -> None:
        """Count a step."""

    def line_fields(self) -> LineFields:
        """Fields of the progress line that is written now."""
        return {}

    def measure(self, due: Due, snapshot: Snapshot) -> LineFields:
        """Further fields that are expensive, if held-out images or a preview are due. An error is only reported.

        It must not use the state of the run, which may be some steps later.
        """
        return {}

    def publish(self, fields: LineFields) -> None:
        """Show the fields of a progress line elsewhere. On worker 0 these are all fields, on others their own."""

    def after_line(self) -> None:
        """Start to count for the next line."""

    def save(self, due: Due, line: Future[ProgressLine | None]) -> None:
        """Write files that are due after a step. `line` is the newest progress line, once it is written."""

    def close(self) -> None:
        """Finish what runs in the background."""


def is_due(run: TrainingRun, every_images: int, plan: StepPlan) -> bool:
    """Whether the step passed a multiple of `every_images`; never for 0."""
    seen = run.state.images_seen
    return every_images > 0 and seen // every_images > (seen - plan.crops) // every_images
