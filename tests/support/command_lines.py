"""Commands of Patchloom in files and pages: what they are, and whether the command line accepts them."""

import itertools
import re
import shlex
from collections.abc import Iterator
from typing import Any

import typer

from patchloom.pipelines.cli.app import app
from patchloom.platform.recipe import load_recipe
from patchloom.platform.recipe.files import SHIPPED, find_config

BLOCK = re.compile(r"^ *```[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(patchloom [a-z][^`\n]*)`")


def command_lines(text: str) -> Iterator[list[str]]:
    """Each `patchloom COMMAND ...` of a file, in comments too, as arguments."""
    text = re.sub(r"^ *# ?", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\\n *", "", text)  # a line that goes on
    text = re.sub(r"(entrypoint: >-\n) *(.*)\n *(.*)", r"\1\2 \3", text)  # a folded string of YAML
    for line in re.findall(r"(?:^|[\s`])patchloom ([a-z]+ [^`|&;#\n]+)", text):
        words = line.replace('"$@"', "").split()
        yield [
            re.sub(r"^\$.*$", "2", word.rstrip(".,:)"))
            for word in re.sub(r"\$\(\(.*?\)\)", "2", " ".join(words)).split()
        ]


def parse(arguments: list[str]) -> None:
    """Raise an error if the command line would, or if it names a recipe or a search that does not ship."""
    group: Any = typer.main.get_command(app)
    launch = group.commands["launch"]
    if arguments[0] == "launch" and arguments[1] not in launch.commands:
        launch.commands["run"].make_context("run", arguments[1:])
        arguments = arguments[3 if arguments[1] == "--address" else 1 :]  # the command that runs on the cluster
    while hasattr(group, "commands"):
        name, *arguments = arguments
        group = group.commands[name]
    values = group.make_context(name, arguments).params
    if values.get("resume"):
        return  # the first argument can be the run
    for named in (values.get("recipe"), values.get("search")):
        if named and re.fullmatch(r"[a-z0-9_]+", named):  # not a file or a placeholder
            find_config(named)


def block_commands(text: str) -> Iterator[str]:
    """Each line of a block that starts with `patchloom`, after settings of the environment."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r" && |; ", line):
                found = re.match(r"\s*(?:[A-Z_]+=\S+ )*(patchloom [a-z].*)", part)
                if found:
                    yield found[1]


def mentioned_commands(text: str) -> Iterator[str]:
    """Commands in the text of a page; they can lack arguments."""
    yield from (found for found in INLINE.findall(BLOCK.sub("", text)) if " " in found.removeprefix("patchloom "))


def check_mention(line: str) -> None:
    """Raise an error if a command or an option does not exist."""
    words = line.split()[1:]
    group: Any = typer.main.get_command(app)
    while hasattr(group, "commands"):
        name, *words = words
        for one in name.split("|"):  # `cache list|clear`
            _ = group.commands[one]
        group = group.commands[name.split("|")[0]]
        if name == "launch" and words and words[0] not in group.commands:
            group = typer.main.get_command(app)  # of the command that runs on the cluster
    options = {option for parameter in group.params for option in parameter.opts}
    unknown = {word.partition("=")[0] for word in words if word.startswith("--")} - options - {"--help"}
    assert not unknown, f"no option {unknown}"


def check_command(line: str) -> None:
    """Raise an error if the command line would, or if a recipe, a search or a recipe's key does not exist."""
    words = shlex.split(line, comments=True)[1:]
    parse(words)
    settings = [value for option, value in itertools.pairwise(words) if option == "--set"]
    if settings:
        load_recipe(words[1] if is_shipped(words[1]) else "demo_pixels", settings)


def is_shipped(name: str) -> bool:
    """Whether a recipe or a search of this name ships with Patchloom."""
    return (SHIPPED / f"{name}.yaml").is_file()


def all_commands() -> Iterator[str]:
    """Every command with its full name: `patchloom models list`."""
    groups = [("patchloom", typer.main.get_command(app))]
    while groups:
        path, group = groups.pop()
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                groups.append((f"{path} {name}", command))
            elif not command.hidden:
                yield f"{path} {name}"
