"""Errors: the exceptions that Patchloom raises on purpose, all below `Error`, except the end by SIGTERM."""

import difflib
import signal
from collections.abc import Iterable

from patchloom.redaction import redacted


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """` (did you mean heun?)`, to follow a value that is not known; empty if no known one is similar."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(value).lower(), by_lower, n=1)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""


class Error(Exception):
    """The base of every exception that Patchloom raises on purpose. Its message has no secrets."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(value) if isinstance(value, str) else value for value in args))


class UserError(Error):
    """Something the user can fix. The command line prints it as one line and exits with code 2.

    The message says what was found, what was wanted and what to do.
    """


class CheckpointError(UserError, ValueError):
    """A model, checkpoint or snapshot that cannot be read."""


class Stopped(Error):
    """A job was asked to stop and has saved everything it needs to continue. The message says how to continue."""


class WorkersFailed(Error):
    """Workers of a training run failed too often. The command line prints the message and exits with code 1."""


class Terminated(SystemExit):
    """SIGTERM ends this process now. It is no `Exception`, so that no handler of errors keeps the process alive.

    Args:
        message: how to continue.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message
