"""Recipe files: where recipes and searches are found, and variants, which name another recipe as their `base`."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.storage import existing_file
from patchloom.platform.recipe.sections import read_yaml

SHIPPED = Path(__file__).parents[2] / "tune_configs"
BASE = "base"


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file of a recipe or search, on this machine or in a store.

    Args:
        folder: the folder that it is in.
        name: its name there.
    """

    folder: Folder
    name: str

    @staticmethod
    def find(name: str) -> "ConfigFile":
        """The file that a path, an address or a name in tune_configs/ stands for.

        Raises:
            UserError: there is no such file here. An address is not looked up yet.
        """
        if is_remote(name):
            return ConfigFile(*Folder.of_file(name))
        path = existing_file(name) or _shipped(name)
        if path is None:
            raise UserError(f"{name} is not a file and not a shipped recipe; give {_choices('a path', name)}")
        return ConfigFile(*Folder.of_file(path.absolute()))

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    def local_path(self) -> Path:
        """Where it is on this machine, after a copy of a remote file; raises UserError if that does not exist."""
        if not self.folder.is_remote:
            return self.folder.path / self.name
        path = working_copy(self.folder, "recipe") / self.name
        try:
            self.folder.fetch(self.name, path)
        except FileNotFoundError:
            raise UserError(f"{self} does not exist: check the address") from None
        return path

    def read(self) -> dict[str, Any]:
        """Its keys and values."""
        return read_yaml(self.local_path())

    def named(self, name: str) -> "ConfigFile":
        """The recipe that this file names: a file relative to its folder, an address, or a shipped recipe.

        Raises:
            UserError: there is no such recipe.
        """
        if is_remote(name):
            return ConfigFile.find(name)
        if self.folder.is_remote:
            parent, _, last = name.rpartition("/")
            if ".." in parent.split("/"):
                raise UserError(f"{self} names the recipe {name}, which is outside of {self.folder}: give its address")
            there = self.folder.folder(parent) if parent else self.folder
            if there.has(last):
                return ConfigFile(there, last)
        elif path := existing_file(str(self.folder.path / name)):
            return ConfigFile(*Folder.of_file(os.path.normpath(path)))
        shipped = _shipped(name)
        if shipped is None:
            raise UserError(
                f"{self} names the recipe {name}, which is neither a file in {self.folder} nor a shipped recipe: give "
                f"{_choices('a path relative to this folder', name)}"
            )
        return ConfigFile(*Folder.of_file(shipped))


def _shipped(name: str) -> Path | None:
    return existing_file(str(SHIPPED / name)) or existing_file(str(SHIPPED / f"{name}.yaml"))


def _choices(path: str, name: str) -> str:
    """What to give instead of a name: a path, a shipped recipe with a similar name, or another one."""
    close = difflib.get_close_matches(name, [path.stem for path in SHIPPED.glob("*.yaml")])
    return f"{', '.join([path, *close])} or a name that `patchloom recipes` lists"


def find_config(name: str) -> Path:
    """The local path of a YAML file, given by its path, its address or its name in tune_configs/."""
    return ConfigFile.find(name).local_path()


def recipe_layers(file: ConfigFile) -> list[tuple[ConfigFile, dict[str, Any]]]:
    """A recipe after its base, the base of that one, and so on: each file with its own keys and values.

    Raises:
        UserError: a file is missing or is not a recipe, or the bases form a cycle.
    """
    layers: list[tuple[ConfigFile, dict[str, Any]]] = []
    while True:
        values = file.read()
        if "space" in values:
            raise UserError(f"{file} is a search, not a recipe; run it with `patchloom tune`")
        base = values.pop(BASE, None)
        layers.insert(0, (file, values))
        if base is None:
            return layers
        if not isinstance(base, str) or not base:
            raise UserError(f"{file}: base: {base!r} is not the path or name of a recipe; write it as base: celeba64")
        file = file.named(base)
        if file in [found for found, _ in layers]:
            chain = " -> ".join([*(found.name for found, _ in reversed(layers)), file.name])
            raise UserError(f"{layers[-1][0]}: the bases form a cycle ({chain}): remove one `base`")


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with changes: sections are merged key by key, and every other value, such as a list, is replaced."""
    found = dict(values)
    for key, value in changes.items():
        before = found.get(key)
        is_section = isinstance(before, Mapping) and isinstance(value, Mapping)
        found[key] = merged(before, value) if is_section else value  # type: ignore[arg-type]
    return found
