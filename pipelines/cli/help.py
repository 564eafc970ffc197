"""Help: commands grouped by what they are for, each with its whole summary and an example that can be copied."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from patchloom.pipelines.cli.output import with_output_options

EXAMPLE = "Example: "  # begins the epilog of each command
INDENT = "  "
NARROW = 20  # a help text needs at least this many columns


class CommandWithExample(TyperCommand):
    """A command whose example is not wrapped in the middle of an option."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example."""
        _write_example(self, formatter)


class GroupByJob(TyperGroup):
    """A group of commands that lists them by job, with the whole first sentence and the example of each."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names in the order of the declaration, sub-groups among the commands of their job."""
        jobs = list(dict.fromkeys(_job(command) for command in self.commands.values()))
        order = sorted(self.commands.items(), key=lambda item: jobs.index(_job(item[1])))
        return [name for name, _ in order]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each job."""
        listed = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        listed = [(name, command) for name, command in listed if not command.hidden]
        width = max(len(name) for name, _ in listed)
        for job in dict.fromkeys(_job(command) for _, command in listed):
            with formatter.section(job):
                for name, command in listed:
                    if _job(command) == job:
                        _write_command(name.ljust(width), command, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example of the group itself."""
        _write_example(self, formatter)


class CommandApp(typer.Typer):
    """A Typer application whose commands have examples, and the options of `output`."""

    def __init__(self, **options: Any) -> None:
        defaults = {"cls": GroupByJob, "rich_markup_mode": None, "add_completion": False}
        super().__init__(**defaults | options, pretty_exceptions_enable=False)

    def add_command(
        self,
        function: Callable[..., Any],
        name: str | None = None,
        *,
        example: str,
        job: str = "Commands",
        has_output_options: bool = True,
        **options: Any,
    ) -> None:
        """Add a function as a command.

        Args:
            function: returns a `Printed`, unless `has_output_options` is False.
            name: of the command; that of the function by default.
            example: a whole command line.
            job: the title of its section in the help.
            has_output_options: add --json, --quiet and --verbose.
            options: further options of `Typer.command`.
        """
        made = with_output_options(function) if has_output_options else function
        super().command(name, cls=CommandWithExample, epilog=f"{EXAMPLE}{example}", rich_help_panel=job, **options)(
            made
        )

    def add(self, example: str, name: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
        """The decorator form of `add_command`, which leaves the function as it is."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            self.add_command(function, name, example=example, **options)
            return function

        return decorate


def _job(command: Any) -> str:
    panel = getattr(command, "rich_help_panel", None)
    return panel if isinstance(panel, str) else "Commands"


def _write_command(name: str, command: Any, formatter: Any) -> None:
    """The name with the first sentence of the help next to it, and the example below."""
    summary = command.short_help or (command.help or "").strip().split("\n\n")[0]
    indent = " " * formatter.current_indent
    column = f"{indent}{name}{INDENT}"
    for number, line in enumerate(_wrapped(" ".join(summary.split()), formatter.width - len(column))):
        formatter.write(f"{column if number == 0 else ' ' * len(column)}{line}\n")
    for line in example_lines(command, formatter.width - len(column)):
        formatter.write(f"{' ' * len(column)}{line}\n")


def _write_example(command: Any, formatter: Any) -> None:
    lines = example_lines(command, formatter.width - len(INDENT))
    if lines:
        formatter.write("\nExample:\n")
        formatter.write("".join(f"{INDENT}{line}\n" for line in lines))


def example_lines(command: Any, width: int) -> list[str]:
    """The example of a command as lines of a shell, which continue with a backslash; none if it has none."""
    text = (command.epilog or "").removeprefix(EXAMPLE)
    *firsts, last = _wrapped(text and f"$ {text}", width - len(" \\")) or [""]
    return [f"{line} \\" for line in firsts] + [last] * bool(last)


def _wrapped(text: str, width: int) -> list[str]:
    """Text in lines of so many characters. An option stays on the line of its value."""
    lines: list[str] = []
    words = text.split(" ")
    pieces: list[str] = []
    for word in words:
        if pieces and pieces[-1].startswith("--") and " " not in pieces[-1] and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    for piece in pieces:
        indent = INDENT if text.startswith("$ ") else ""
        if lines and len(lines[-1]) + 1 + len(piece) <= max(width, NARROW):
            lines[-1] += f" {piece}"
        elif piece:
            lines.append(f"{indent if lines else ''}{piece}")
    return lines
