"""Patience: operations on a store that does not answer are repeated for a while."""

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any, ParamSpec, TypeVar

from patchloom.errors import UserError
from patchloom.platform.progress import say

STORE_WAIT_S, DEFAULT_STORE_WAIT_S = "PATCHLOOM_STORE_WAIT_S", 120.0
STORE_NOTICE_AFTER_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0
# how pyarrow, obstore and fsspec report a store that is down, busy or not reached, not one that refuses
PASSING = re.compile(
    r"HTTP status 5\d\d|status code: 5\d\d|error sending request|NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|"
    r"INTERNAL_FAILURE|REQUEST_TIMEOUT|[Tt]imed? ?out|Connection (refused|reset)|curlCode: (7|28|52|56)\b"
)

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class StoreError(UserError):
    """A store did not do what was asked. `is_passing`: it is down or busy, and may answer later."""

    def __init__(self, message: str, is_passing: bool) -> None:
        super().__init__(message)
        self.is_passing = is_passing

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.is_passing)


class _Outage:
    """When a store that had answered stopped to answer; the operations of a process share it."""

    has_answered = False
    began: float | None = None


_outages: dict[str, _Outage] = {}


def store_wait_s() -> float:
    """For how long operations on a store that does not answer are repeated; raises UserError for a wrong setting."""
    text = os.environ.get(STORE_WAIT_S) or str(DEFAULT_STORE_WAIT_S)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{STORE_WAIT_S}={text} is not a number: give seconds") from None


def patient(
    store: Callable[..., str],
) -> Callable[[Callable[Arguments, Answer]], Callable[Arguments, Answer]]:
    """Repeat a method during an outage of a store that has answered before. A store that never answered fails at once.

    Args:
        store: returns the name of the store of the object, empty if it needs no patience.
    """

    def decorate(method: Callable[Arguments, Answer]) -> Callable[Arguments, Answer]:
        @functools.wraps(method)
        def repeat(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
            name = store(args[0])
            return method(*args, **kwargs) if not name else _repeat(name, lambda: method(*args, **kwargs))

        return repeat

    return decorate


def _repeat(store: str, ask: Callable[[], Answer]) -> Answer:
    outage, pause = _outages.setdefault(store, _Outage()), FIRST_PAUSE_S
    while True:
        try:
            with _notice(store, outage):
                answer = ask()
        except StoreError as error:
            wait = store_wait_s()
            if not (error.is_passing and outage.has_answered):
                raise
            if outage.began is None:
                outage.began = time.monotonic()
                say(f"  {store} does not answer; trying again for {wait:.0f} s")
            if time.monotonic() - outage.began + pause > wait:
                raise
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
            continue
        if outage.began is not None:
            say(f"  {store} answers again")
        outage.has_answered, outage.began = True, None
        return answer


@contextmanager
def _notice(store: str, outage: _Outage) -> Iterator[None]:
    """Say during a long operation that a store has not answered yet. Its own client may try for minutes."""
    if outage.has_answered:
        yield
        return
    advice = "check its address" + (" and AWS_ENDPOINT_URL" if store.startswith("s3://") else "")
    timer = Timer(STORE_NOTICE_AFTER_S, say, [f"  {store} has not answered yet; {advice}"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def begin_to_wait(store: str) -> None:
    """Give a store that does not answer the whole time once more."""
    outage = _outages.setdefault(store, _Outage())
    outage.began = None if outage.began is None else time.monotonic()
