"""Progress of long jobs: what is done, the rate and the remaining time."""

import enum
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from patchloom.redaction import printable

console = Console(highlight=False, soft_wrap=True)
LOG_LINE_EVERY_S = 10.0
WIDE_TERMINAL = 110  # columns from which there is room for a bar


_listeners: dict[str, Callable[[str], None]] = {}


class Verbosity(enum.Enum):
    """How much this process prints."""

    QUIET = "quiet"  # results and errors
    NORMAL = "normal"
    VERBOSE = "verbose"  # the time of each message, and tracebacks


_verbosity = Verbosity.NORMAL
_shows_results = True


def set_verbosity(verbosity: Verbosity) -> None:
    """Print as much from now on."""
    global _verbosity
    _verbosity = verbosity


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _verbosity is Verbosity.QUIET


def is_verbose() -> bool:
    """Whether tracebacks of errors are wanted."""
    return _verbosity is Verbosity.VERBOSE


@contextmanager
def without_results() -> Iterator[None]:
    """Do not print the results of commands that are a part of another one during the block; progress is shown."""
    global _shows_results
    before, _shows_results = _shows_results, False
    try:
        yield
    finally:
        _shows_results = before


def say(text: str, *, is_result: bool = False) -> None:
    """Print a line without secrets and control characters, and pass it to those who listen.

    Args:
        text: the line.
        is_result: it is what the command was run for, which is printed also with --quiet.
    """
    text = printable(text)
    if _shows_results if is_result else not is_quiet():
        stamp = time.strftime("%H:%M:%S ") if is_verbose() and not is_result else ""
        console.print(f"{stamp}{text}", markup=False)
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


def fitted(rows: Sequence[Sequence[str]], least_important: Sequence[str] = ()) -> str:
    """A table with a header as `aligned` makes it. On a terminal, columns are left out until it fits.

    Args:
        rows: the header, and rows of equal length.
        least_important: titles of columns that can be left out, the first one first.
    """
    table = aligned(rows)
    for title in least_important if console.is_terminal else ():
        if max(map(len, table.splitlines())) <= console.width:
            break
        column = list(rows[0]).index(title)
        rows = [[*row[:column], *row[column + 1 :]] for row in rows]
        table = aligned(rows)
    return table


def with_descriptions(rows: Sequence[Sequence[str]]) -> str:
    """A table whose last column is a text. On a terminal that is too narrow for it, the text is below its row."""
    table = aligned(rows)
    if not console.is_terminal or max(map(len, table.splitlines())) <= console.width:
        return table
    first = aligned([row[:-1] for row in rows]).splitlines()
    indent = " " * 6
    texts = [textwrap.fill(row[-1], console.width, initial_indent=indent, subsequent_indent=indent) for row in rows]
    return "\n".join(line for pair in zip(first, texts, strict=True) for line in pair)


class Meter:
    """How much of a job is done, as text with the most important parts first."""

    def __init__(self, total: float, unit: str) -> None:
        self.total, self.unit, self.done = total, unit, 0.0
        self.notes: tuple[str, ...] = ()
        self._started: tuple[float, float] | None = None  # the time of the first update, and what was done then

    def begin(self, done: float) -> None:
        """Set how much an earlier call has done, before the work continues."""
        self.done = done

    def start(self) -> None:
        """Measure the rate from now on, instead of from the first update."""
        self._started = (time.monotonic(), self.done)

    def update(self, done: float, *notes: str) -> None:
        """Set how much is done now, and notes that are shown with it, the most important one first."""
        if self._started is None:
            self._started = (time.monotonic(), done)
        self.done, self.notes = done, tuple(filter(None, notes))

    @property
    def rate(self) -> float:
        """Units per second since `start` or the first update; 0 before it."""
        if self._started is None:
            return 0.0
        start, start_done = self._started
        return (self.done - start_done) / max(time.monotonic() - start, 1e-9)

    def describe(self, width: float = float("inf")) -> str:
        """The progress as text, such as `120/400 images  31.2/s  ETA 9s  loss 0.31`.

        Args:
            width: the most characters. Parts from the end are left out if all are longer.
        """
        parts = [f"{self.done:,.0f}/{self.total:,.0f} {self.unit}"]
        if self.rate > 0:
            parts.append(f"{self.rate:,.1f}/s")
            if self.done < self.total:
                parts.append(f"ETA {clock((self.total - self.done) / self.rate)}")
        parts += self.notes
        while len(parts) > 1 and len("  ".join(parts)) > width:
            parts.pop()
        return "  ".join(parts)


class _MeterColumn(ProgressColumn):
    """The title and the meter, in what the other columns leave of the width of the terminal."""

    def __init__(self, taken: int) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="ellipsis"))
        self._taken = taken

    def render(self, task: Task) -> Text:
        meter: Meter = task.fields["meter"]
        left, title = console.width - self._taken, task.description
        if len(title) > left // 2:
            title = f"{title[: left // 2 - 1]}…"
        shown = meter.describe(left - len(title) - 1) if meter.done or meter.notes else "starting"
        return Text(f"{title} {shown}")


class _LogMeter(Meter):
    """A meter for logs and pipes, which prints a line every few seconds."""

    def __init__(self, title: str, total: float, unit: str) -> None:
        super().__init__(total, unit)
        self.title, self._printed_at = title, time.monotonic()

    def update(self, done: float, *notes: str) -> None:
        super().update(done, *notes)
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
    if console.is_terminal and sys.stdout.isatty() and _verbosity is not Verbosity.QUIET:
        # a redirected stdout would make the bar's control characters visible, as those of other texts (`redaction`)
        with Progress(*_columns(), console=console, transient=True, redirect_stdout=False) as bar:
            meter = Meter(total, unit)
            bar.add_task(title, total=None, meter=meter)
            task = bar.tasks[0]

            original = meter.update

            def update(done: float, *notes: str) -> None:
                original(done, *notes)
                bar.update(task.id, completed=done, total=total)

            meter.update = update  # type: ignore[method-assign]
            yield meter
    else:
        meter = _LogMeter(title, total, unit)
        yield meter
    say(f"  {title}: {meter.done:,.0f} {unit} in {clock(time.monotonic() - start)}")


def _columns() -> list[ProgressColumn]:
    """The columns of a progress line: a bar and the elapsed time only on wide terminals."""
    if console.width < WIDE_TERMINAL:
        return [SpinnerColumn(), _MeterColumn(taken=2)]
    return [SpinnerColumn(), BarColumn(20), _MeterColumn(taken=32), TimeElapsedColumn()]
