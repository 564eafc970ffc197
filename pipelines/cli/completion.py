"""Completion: the words that a shell offers after `patchloom`, made by Typer from the commands themselves."""

import os
from enum import StrEnum
from typing import Annotated

import typer
from typer.completion import completion_init, get_completion_script  # type: ignore[attr-defined]  # no __all__

PROGRAM, VARIABLE = "patchloom", "_PATCHLOOM_COMPLETE"


class Shell(StrEnum):
    """The shells that have completion."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(help="bash, zsh or fish")]) -> None:
    """Print the script that completes commands, options and names in a shell.

    Add it to the start of the shell: `eval "$(patchloom completion bash)"` in ~/.bashrc, the same with zsh in ~/.zshrc
    after compinit, and `patchloom completion fish | source` in ~/.config/fish/config.fish.
    """
    print(get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell.value))


def prepare_completion() -> None:
    """If a shell asks for completions, let Typer answer."""
    if VARIABLE in os.environ:
        completion_init()


def recipe_names(incomplete: str) -> list[str]:
    """The shipped recipes that begin so."""
    return [name for name in _shipped_names(incomplete) if "search" not in name]


def search_names(incomplete: str) -> list[str]:
    """The shipped searches that begin so."""
    return [name for name in _shipped_names(incomplete) if "search" in name]


def _shipped_names(incomplete: str) -> list[str]:
    from patchloom.platform.recipe.files import SHIPPED

    return sorted(path.stem for path in SHIPPED.glob("*.yaml") if path.stem.startswith(incomplete))


def reproduced_tables(incomplete: str) -> list[str]:
    """The tables and figures of the paper that begin so."""
    from patchloom.pipelines.reproduce.subjects import SUBJECTS

    return [name for name in SUBJECTS if name.startswith(incomplete)]
