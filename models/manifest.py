"""Manifest: the sha256 of every file of a model folder, in `files.json` next to them.

The registry keeps the sha256 of this file with the version, so that no file of a registered model can be exchanged.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from patchloom.errors import CheckpointError

MANIFEST_FILE, MANIFEST_FORMAT = "files.json", 1
WHOLE_FOLDERS = ("autoencoder",)  # a loader may read any file in these


def write_manifest(folder: Path) -> None:
    """Write the manifest of a model folder, after all other files."""
    files = {name: sha256_of_file(folder / name) for name in _names(folder)}
    content = {"format_version": MANIFEST_FORMAT, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n")


def check_manifest(folder: Path, digests: dict[str, str] | None = None) -> None:
    """Compare the files of a model folder with its manifest, if it has one.

    Args:
        folder: the model folder.
        digests: the sha256 of files that the caller has read.

    Raises:
        CheckpointError: a file is missing, was changed or was added, or the manifest is damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return  # older versions wrote none
    try:
        content = json.loads(path.read_bytes())
        version, files = int(content["format_version"]), dict(content["files"])
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is damaged: fetch the model again") from None
    if version > MANIFEST_FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, and this version reads up to {MANIFEST_FORMAT}: update patchloom"
        )
    found = list(_names(folder))
    if missing := sorted(files.keys() - set(found)):
        raise CheckpointError(f"{folder} has no {missing[0]}, which its {MANIFEST_FILE} names: fetch the model again")
    for name in found:
        if name not in files:
            raise CheckpointError(f"{folder / name} is not in {MANIFEST_FILE}: remove it, or fetch the model again")
        sha256 = (digests or {}).get(name) or sha256_of_file(folder / name)
        if sha256 != files[name]:
            raise CheckpointError(
                f"{folder / name} was changed: it has sha256 {sha256[:12]} instead of {str(files[name])[:12]}: fetch "
                "the model again"
            )


def check_regular(folder: Path) -> None:
    """Raise CheckpointError for a link that leads out of a model folder, and for what is neither file nor folder."""
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise CheckpointError(f"{path} is a link out of the model folder: replace it by the file")
        if not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path} is not a regular file: remove it from the model folder")


def _names(folder: Path) -> Iterator[str]:
    """The files that belong to a model: those that Patchloom writes, and all that its autoencoder could be read from.

    Other files, such as the notes of a user, are never read.
    """
    for name in ("model.json", "model.safetensors", "recipe.yaml", "config.json"):
        if (folder / name).is_file():
            yield name
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != "model.safetensors":
            yield path.name
    for inner in WHOLE_FOLDERS:
        for path in sorted((folder / inner).rglob("*")):
            if path.is_file():
                yield path.relative_to(folder).as_posix()


def sha256_of_file(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
