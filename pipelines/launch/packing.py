"""Packing: the folder that travels with a job: small files that its command names, and Patchloom's code."""

import io
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import yaml

from patchloom.errors import UserError
from patchloom.pipelines.registry.wheel import wheel_bytes
from patchloom.platform.files.folder import is_remote
from patchloom.platform.recipe.files import BASE, ConfigFile, find_config
from patchloom.platform.recipe.run_recipe import recipe_values
from patchloom.platform.recipe.sections import read_yaml

# Arguments of commands, by name. A file travels; data does not. A place is always a path or an address; a reference
# can also be a name, such as models:/NAME@ALIAS.
FILE_ARGUMENTS = frozenset({"recipe", "search", "labels", "seeds", "resources"})
PLACES = frozenset(
    {
        "source",
        "dataset",
        "data",
        "out",
        "samples",
        "folder",
        "run",
        "snapshot",
        "save_reference",
        "store",
        "conditions",
        "text",
    }
)
REFERENCES = frozenset(
    {
        "what",
        "model",
        "one",
        "other",
        "reference",
        "autoencoder",
        "init_from",
        "features",
        "text_encoder",
        "picture",
        "outpaint",
        "condition",
        "inpaint",
        "mask",
    }
)
YAML = (".yaml", ".yml")
WRITTEN = {"out", "save_reference", "store"}  # places that a command may make
WRITES_HERE = {"reproduce"}  # commands with a default folder to write
NAMED_SOURCE = re.compile(r"^[a-z0-9]+=")
MOST_BYTES = 10 << 20  # of a file that travels
FILES = "files"  # the folder of files that are not below the working directory


def pack_command(words: list[str], arguments: dict[str, Any], folder: Path) -> list[str]:
    """Copy the files that a command names to the folder of its job.

    Args:
        words: the command, such as `train recipe.yaml --data s3://bucket/data`.
        arguments: the values of its arguments and options by name.
        folder: the folder that travels.

    Returns:
        The words for the job; they differ for files that have another path there.

    Raises:
        UserError: a file is large, a recipe or search does not exist, or data is on this machine.
    """
    given = [
        (name, value) for name, one in arguments.items() for value in (one if isinstance(one, list | tuple) else [one])
    ]
    for name, value in given:
        if not isinstance(value, str) or not value:
            continue
        if name in FILE_ARGUMENTS:
            if name in ("recipe", "search") and value.endswith(YAML) and not Path(value).is_absolute():
                find_config(value)  # a mistake is refused here, before the job
            packed = _pack_file(value, folder)
            if (folder / packed).is_file():
                _pack_named(name, Path(value), Path(packed), folder)
            words = [_renamed(word, value, packed) for word in words]
        elif name in PLACES | REFERENCES:
            _check_place(_without_name(value), name in PLACES)
    if words[0] in WRITES_HERE and not (arguments.get("out") or arguments.get("dry_run")):
        raise UserError(f"--out is missing: {words[0]} would write to a folder of the job, which is removed")
    return words


def _without_name(value: str) -> str:
    """The source in `celeba=s3://bucket/images`."""
    return NAMED_SOURCE.sub("", value)


def _renamed(word: str, old: str, new: str) -> str:
    option, mark, value = word.partition("=")
    if option.startswith("--") and mark and value == old:
        return f"{option}={new}"
    return new if word == old else word


def _pack_file(text: str, folder: Path) -> str:
    """Copy a file if there is one; returns its path for the job."""
    path = Path(text)
    if is_remote(text) or not path.is_file():
        return text  # a recipe that ships with Patchloom, a list of seeds, or a file of the nodes
    inside = Path(os.path.relpath(path))
    target = inside if _is_inside(inside) else Path(FILES) / path.name
    _copy(path, folder / target)
    return target.as_posix()


def _pack_named(name: str, file: Path, packed: Path, folder: Path) -> None:
    """Copy the recipe that a search names, and check the initial weights that a recipe names."""
    if name == "recipe":
        _pack_recipe(file, folder / packed)
    if name != "search":
        return
    recipe = read_yaml(file).get("recipe")
    if not isinstance(recipe, str) or not (file.parent / recipe).is_file():
        return  # the name of a shipped recipe
    target = Path(os.path.normpath(packed.parent / recipe))
    if not _is_inside(target):
        raise UserError(f"{file} names the recipe {recipe}, which cannot travel: put it in the folder of the search")
    _pack_recipe(file.parent / recipe, folder / target)


def _pack_recipe(recipe: Path, target: Path) -> None:
    """Copy a recipe. A variant travels as one file with the keys of its bases, which can be in any folder here."""
    values = recipe_values(ConfigFile.find(str(recipe)))
    train = values.get("train")
    weights = train.get("init_from") if isinstance(train, dict) else None
    if isinstance(weights, str):
        _check_place(weights, False)
    _copy(recipe, target)
    if BASE in read_yaml(recipe):
        target.write_text(yaml.safe_dump(values, sort_keys=False))


def _is_inside(path: Path) -> bool:
    return not path.is_absolute() and ".." not in path.parts


def _copy(path: Path, target: Path) -> None:
    if path.stat().st_size > MOST_BYTES:
        raise UserError(
            f"{path} has {path.stat().st_size / 1e6:.0f} MB, and files of up to 10 MB travel with a job: copy it to an "
            "object store or to a file system that every node mounts"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, target)


def absolute_paths(arguments: dict[str, Any]) -> list[str]:
    """The absolute paths that a command reads and that exist on this machine, perhaps on it alone."""
    found = [value for name, value in arguments.items() if name in (PLACES | REFERENCES) - WRITTEN]
    values = [one for value in found for one in (value if isinstance(value, list | tuple) else [value])]
    paths = [Path(_without_name(value)) for value in values if isinstance(value, str) and value]
    return [str(path) for path in paths if path.is_absolute() and path.exists()]


def _check_place(text: str, is_always_path: bool) -> None:
    if is_remote(text) or text.startswith(("models:/", "runs:/")) or Path(text).is_absolute():
        return
    if is_always_path or Path(text).exists():
        raise UserError(
            f"{text} is a path on this machine, and data does not travel: give an address such as s3://bucket/{text}, "
            "or an absolute path on a file system that every node mounts"
        )


def pack_code(folder: Path) -> None:
    """Write Patchloom's code to a folder: the content of its wheel, so that nodes need no pip."""
    with zipfile.ZipFile(io.BytesIO(wheel_bytes())) as wheel:
        wheel.extractall(folder)
