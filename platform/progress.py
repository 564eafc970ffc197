"""Progress: how far a long job is, how fast it goes and when it will end."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

console = Console(highlight=False, soft_wrap=True)
PLAIN_EVERY_S = 10.0


def say(text: str) -> None:
    """One line to the person watching."""
    console.print(text, markup=False)


def clock(seconds: float) -> str:
    """Seconds as `3s`, `2m05s` or `1h02m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Meter:
    """A job's position; what it prints is the same words on a terminal and in a log file."""

    def __init__(self, total: float, unit: str) -> None:
        self.total, self.unit, self.done, self.note = total, unit, 0.0, ""
        self._started: tuple[float, float] | None = None  # when and where the work itself began

    def begin(self, done: float) -> None:
        """Say how much an earlier call had done, before the work goes on."""
        self.done = done

    def update(self, done: float, note: str = "") -> None:
        """Say how much is done now, and perhaps what else is worth knowing."""
        if self._started is None:
            self._started = (time.monotonic(), done)
        self.done, self.note = done, note

    @property
    def rate(self) -> float:
        """Units a second since the first update; 0 before there is one."""
        if self._started is None:
            return 0.0
        began, at = self._started
        return (self.done - at) / max(time.monotonic() - began, 1e-9)

    def words(self) -> str:
        """`120/400 images  31.2/s  ETA 9s  loss 0.31`."""
        parts = [f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"]
        if self.rate > 0:
            parts.append(f"{self.rate:,.1f}/s")
            if self.done < self.total:
                parts.append(f"ETA {clock((self.total - self.done) / self.rate)}")
        return "  ".join([*parts, self.note] if self.note else parts)


class _Words(ProgressColumn):
    def render(self, task: Task) -> Text:
        meter: Meter = task.fields["meter"]
        return Text(meter.words() if meter.done or meter.note else "starting")


class _PlainMeter(Meter):
    """For logs and pipes: a line now and then."""

    def __init__(self, title: str, total: float, unit: str) -> None:
        super().__init__(total, unit)
        self.title, self._said = title, time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        super().update(done, note)
        if time.monotonic() - self._said >= PLAIN_EVERY_S:
            self._said = time.monotonic()
            say(f"  {self.title}: {self.words()}")


@contextmanager
def progress(title: str, total: float, unit: str) -> Iterator[Meter]:
    """Show a job's progress while the block runs, and one line of what it took at the end."""
    began = time.monotonic()
    if console.is_terminal and sys.stdout.isatty():
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), _Words(), TimeElapsedColumn())
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
        meter = _PlainMeter(title, total, unit)
        yield meter
    say(f"  {title}: {meter.done:,.0f} {unit} in {clock(time.monotonic() - began)}")
