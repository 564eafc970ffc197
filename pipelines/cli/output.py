"""Output: --json, --quiet and --verbose, which every command takes, and what a command prints at its end."""

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Protocol

import typer

from patchloom.errors import UserError
from patchloom.platform.progress import Verbosity, say, set_verbosity

Json = Annotated[
    bool, typer.Option("--json", help="Print the result as one JSON document to stdout, and progress to stderr")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result, and errors")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print the time of each message, and the traceback of an error")
]


@dataclass(frozen=True)
class Printed:
    """What a command prints at its end.

    Args:
        value: the result with --json: any value of JSON, or text that is JSON, or a function that makes one of them.
        text: the result without it, or a function that makes it; empty where the command has shown it already.
        exit_code: 0, or that of a command whose finding is a problem.
    """

    value: Any
    text: str | Callable[[], str] = ""
    exit_code: int = 0


class DryRun(Protocol):
    """What `--dry-run` found: a dataclass with a text."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def text(self) -> str:
        """It as lines for a terminal."""


def printed_plan(found: DryRun, **more: Any) -> Printed:
    """What a command prints with --dry-run: the text, or with --json its numbers and `more`, and the text as `plan`."""
    return Printed({"plan": found.text, **more, **asdict(found)}, found.text)


def with_output_options(function: Callable[..., Printed]) -> Callable[..., None]:
    """A command with --json, --quiet and --verbose, which prints what the function returns."""

    @functools.wraps(function)
    def command(*arguments: Any, as_json: bool, quiet: bool, verbose: bool, **options: Any) -> None:
        if quiet and verbose:
            raise UserError("--quiet and --verbose contradict each other: leave one of them out")
        set_verbosity(Verbosity.QUIET if quiet else Verbosity.VERBOSE if verbose else Verbosity.NORMAL)
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            printed = function(*arguments, **options)
            shown = printed.value if as_json else printed.text
            shown = shown() if callable(shown) else shown
        if as_json:
            print(shown if isinstance(shown, str) else json.dumps(shown, default=str))
        elif shown:
            say(shown, is_result=True)
        if printed.exit_code:
            raise typer.Exit(printed.exit_code)

    signature = inspect.signature(function)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("as_json", Json), ("quiet", Quiet), ("verbose", Verbose))
    ]
    parameters = [*signature.parameters.values(), *added]
    # typer reads the options from the signature
    command.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    return command
