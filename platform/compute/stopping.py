"""Stopping: how SIGTERM and a deadline end a run, with a checkpoint while its workers train, else at once."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

from patchloom.errors import Error, Stopped, Terminated
from patchloom.platform.files.folder import Folder
from patchloom.platform.progress import say

Answer = TypeVar("Answer")

STOPPING_WAIT_S = 600.0  # how long workers that were asked to stop may take for their step and its checkpoint
CHECK_EVERY_S = 0.2
MARGIN_SHARE, MAX_MARGIN_S = 0.05, 300.0  # of a limit of hours, for the last step and its checkpoint
CONTINUE_RUN = "continue with the same command and --resume"


@dataclass(frozen=True)
class RunControl:
    """What the process of a command knows of the workers of its run, and how it asks them to stop.

    Args:
        ask: asks the workers to write a checkpoint and return.
        save: asks the workers to write a checkpoint and go on.
        has_begun: whether workers train now, so that they can answer.
        reset: notes that no workers train now.
        newest_step: the step of the newest checkpoint; 0 if there is none. It is pickled.
        stop_at: a time of `time.monotonic` at which the workers are asked to stop. None: never.
        run: the run folder, which gets the logs of the workers. None: no logs.
    """

    ask: Callable[[], None]
    save: Callable[[], None]
    has_begun: Callable[[], bool]
    reset: Callable[[], None]
    newest_step: Callable[[], int]
    stop_at: float | None = None
    run: Folder | None = None


@dataclass
class _Stop:
    """The state of a request to stop."""

    control: RunControl
    signals: int = 0
    asked_at: float | None = field(default=None)

    def on_signal(self, *_: object) -> None:
        """Handle SIGTERM: the first one asks the workers, the second one ends the process."""
        self.signals += 1
        if self.signals > 1:
            raise Terminated(f"a second SIGTERM arrived: {self.newest()}")

    def check(self) -> None:
        """Ask the workers to stop if that is due. Raises Terminated if they do not train or do not answer."""
        if self.asked_at is None and (self.signals or _is_past(self.control.stop_at)):
            if not self.control.has_begun():
                raise Terminated(f"no worker was training: {self.newest()}")
            self.asked_at = time.monotonic()
            say("  stopping: the workers write a checkpoint ...")
            self.control.ask()
        if self.asked_at is not None and time.monotonic() > self.asked_at + STOPPING_WAIT_S:
            raise Terminated(f"the workers did not stop within {STOPPING_WAIT_S:.0f} s: {self.newest()}")

    def newest(self) -> str:
        """How to continue, and from which step."""
        step = self.control.newest_step()
        return f"the newest checkpoint is of step {step:,}; {CONTINUE_RUN}" if step else CONTINUE_RUN


def stop_time(max_hours: float | None) -> float | None:
    """When a run that begins now is asked to stop, so that its checkpoint is written before the hours are over."""
    if max_hours is None:
        return None
    seconds = 3600 * max_hours
    return time.monotonic() + seconds - min(MARGIN_SHARE * seconds, MAX_MARGIN_S)


def _is_past(stop_at: float | None) -> bool:
    return stop_at is not None and time.monotonic() >= stop_at


def call_until_stopped(work: Callable[[], Answer], control: RunControl | None) -> Answer:
    """Call a function that waits for workers, in a thread, so that this thread handles signals at once.

    Args:
        work: the function.
        control: the run. None: signals have their usual effect.

    Raises:
        Stopped: SIGTERM arrived or the time is up, and the workers did not train or did not answer.
    """
    stop, future = _Stop(control) if control else None, _in_thread(work)
    try:
        with _handling(signal.SIGTERM, stop.on_signal if stop else None):
            while not future.done():
                time.sleep(CHECK_EVERY_S)
                if stop:
                    stop.check()
    except Terminated as error:
        raise Stopped(str(error)) from None
    if (
        stop
        and stop.signals
        and isinstance(future.exception(), Exception)
        and not isinstance(future.exception(), Error)
    ):
        raise Stopped(f"the workers ended before they could write a checkpoint: {stop.newest()}")
    return future.result()


def call_here(work: Callable[[], Answer], control: RunControl | None) -> Answer:
    """Call a function that trains in this thread. SIGTERM and the deadline ask it to stop, as above.

    Ctrl-C ends it at once. Libraries catch the KeyboardInterrupt now and then; then it stops after its next step.
    """
    if control is None:
        return work()
    stop, ended, interrupted = _Stop(control), threading.Event(), threading.Event()

    def on_interrupt(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            threading.Thread(target=control.ask, name="interrupt", daemon=True).start()  # a store may not answer
        raise KeyboardInterrupt

    def on_signal(*_: object) -> None:
        stop.on_signal()
        stop.check()

    def ask_in_time() -> None:
        if not ended.wait(max(0.0, (control.stop_at or 0) - time.monotonic())):
            control.ask()  # if it does not train yet, it stops after its first step

    if control.stop_at is not None:
        threading.Thread(target=ask_in_time, name="deadline", daemon=True).start()
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a process in the background ignores it
    try:
        with _handling(signal.SIGTERM, on_signal), _handling(signal.SIGINT, on_interrupt if is_usual else None):
            answer = work()
    except Terminated as error:
        raise Stopped(str(error)) from None
    finally:
        ended.set()
    if interrupted.is_set():
        raise KeyboardInterrupt
    return answer


def _in_thread(work: Callable[[], Answer]) -> Future[Answer]:
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="workers", daemon=True).start()
    return future


@contextmanager
def _handling(number: signal.Signals, handler: Callable[..., None] | None) -> Iterator[None]:
    """Call `handler` on a signal during the block. Only the main thread can set signal handlers."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.getsignal(number)
    try:
        signal.signal(number, handler)
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def kept_sigterm_handler() -> Iterator[None]:
    """Restore the handler of SIGTERM after the block, which may set another one, as the start of Ray does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: Any = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_on_sigterm() -> None:
    """Let SIGTERM raise Terminated in this process, so that it ends in order and within seconds."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise Terminated
