"""Progress of long jobs: what is done, the rate and the remaining time."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from patchloom.redaction import printable

console = Console(highlight=False, soft_wrap=True)
LOG_LINE_EVERY_S = 10.0


_listeners: dict[str, Callable[[str], None]] = {}


def say(text: str) -> None:
    """Print a line without secrets and control characters, and pass it to those who listen."""
    text = printable(text)
    console.print(text, markup=False)
    for listener in list(_listeners.values()):
        listener(text)


def on_say(name: str, listener: Callable[[str], None]) -> None:
    """Call a function with each line that `say` prints from now on; a new listener replaces the one of its name."""
    _listeners[name] = listener


def is_heard(name: str) -> bool:
    """Whether a listener of this name is set."""
    return name in _listeners


def clock(seconds: float) -> str:
    """Seconds as `3s`, `2m05s` or `1h02m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as a table, whose columns are as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class Meter:
    """How much of a job is done. Its text is the same on a terminal and in a log file."""

    def __init__(self, total: float, unit: str) -> None:
        self.total, self.unit, self.done, self.note = total, unit, 0.0, ""
        self._started: tuple[float, float] | None = None  # the time of the first update, and what was done then

    def begin(self, done: float) -> None:
        """Set how much an earlier call has done, before the work continues."""
        self.done = done

    def start(self) -> None:
        """Measure the rate from now on, instead of from the first update."""
        self._started = (time.monotonic(), self.done)

    def update(self, done: float, note: str = "") -> None:
        """Set how much is done now, and a note that is shown with it."""
        if self._started is None:
            self._started = (time.monotonic(), done)
        self.done, self.note = done, note

    @property
    def rate(self) -> float:
        """Units per second since `start` or the first update; 0 before it."""
        if self._started is None:
            return 0.0
        start, start_done = self._started
        return (self.done - start_done) / max(time.monotonic() - start, 1e-9)

    def describe(self) -> str:
        """The progress as text, such as `120/400 images  31.2/s  ETA 9s  loss 0.31`."""
        parts = [f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"]
        if self.rate > 0:
            parts.append(f"{self.rate:,.1f}/s")
            if self.done < self.total:
                parts.append(f"ETA {clock((self.total - self.done) / self.rate)}")
        return "  ".join([*parts, self.note] if self.note else parts)


class _MeterColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        meter: Meter = task.fields["meter"]
        return Text(meter.describe() if meter.done or meter.note else "starting")


class _LogMeter(Meter):
    """A meter for logs and pipes, which prints a line every few seconds."""

    def __init__(self, title: str, total: float, unit: str) -> None:
        super().__init__(total, unit)
        self.title, self._printed_at = title, time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        super().update(done, note)
        if time.monotonic() - self._printed_at >= LOG_LINE_EVERY_S:
            self._printed_at = time.monotonic()
            say(f"  {self.title}: {self.describe()}")


@contextmanager
def progress(title: str, total: float, unit: str) -> Iterator[Meter]:
    """Show the progress of a job during the block, and one line with its duration at the end.

    Args:
        title: what the job does, such as "preparing".
        total: the amount of work, in units.
        unit: name of the unit, such as "images".
    """
    start, title = time.monotonic(), printable(title)
    if console.is_terminal and sys.stdout.isatty():
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(20),
            _MeterColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            meter = Meter(total, unit)
            bar.add_task(title, total=None, meter=meter)
            task = bar.tasks[0]

            original = meter.update

            def update(done: float, note: str = "") -> None:
                original(done, note)
                bar.update(task.id, completed=done, total=total)

            meter.update = update  # type: ignore[method-assign]
            yield meter
    else:
        meter = _LogMeter(title, total, unit)
        yield meter
    say(f"  {title}: {meter.done:,.0f} {unit} in {clock(time.monotonic() - start)}")
