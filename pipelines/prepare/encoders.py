"""Encoders: the autoencoder and the text encoder of `prepare`, from the registry, a folder or Hugging Face's hub."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from patchloom.errors import UserError
from patchloom.models.text_encoder import NETWORK_FILES, TOKENIZER_FILES, text_encoder_files
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder, is_remote
from patchloom.platform.files.storage import local_path, read_json
from patchloom.platform.tracking.registry import fetch_model

if TYPE_CHECKING:
    from patchloom.models.cards import AutoencoderCard

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


def fetch_autoencoder(reference: str) -> "tuple[Path, AutoencoderCard]":
    """Fetch an autoencoder to this machine.

    Args:
        reference: models:/..., a folder (also a remote one), or the id of a model on Hugging Face's hub.

    Returns:
        Its folder, and its card with the resolved reference.

    Raises:
        UserError: it cannot be fetched.
    """
    from patchloom.models.autoencoder import load_autoencoder

    if reference.startswith(("models:/", "runs:/")):
        fetched = fetch_model(reference)
        folder, resolved = fetched.folder, fetched.reference
    elif _is_hub_name(reference):
        folder, resolved = _from_hub(reference)
    else:
        folder, resolved = local_copy(reference), Folder.at(reference).name  # the path differs between machines
    return folder, replace(load_autoencoder(folder).describe(), reference=resolved)


def fetch_text_encoder(reference: str) -> tuple[Path, str]:
    """Fetch a text encoder to this machine.

    Args:
        reference: a folder (also a remote one) or the id of a model on Hugging Face's hub.

    Returns:
        Its folder and its resolved name.

    Raises:
        UserError: it cannot be fetched, or a file is missing.
    """
    files = (*NETWORK_FILES, *TOKENIZER_FILES)
    if _is_hub_name(reference):
        folder = _snapshot("--text-encoder", reference, files, "give a folder")
        resolved = f"{reference}@{folder.name}"
    else:
        folder = local_copy(reference, lambda name: name in files)
        resolved = Folder.at(reference).name  # the path differs between machines
    text_encoder_files(folder)
    return folder, resolved


def _is_hub_name(reference: str) -> bool:
    """Whether a reference is the id of a model on Hugging Face's hub, because there is no such folder."""
    is_here = is_remote(reference) or local_path(reference).exists()
    return not is_here and HUB_NAME.fullmatch(reference) is not None


def image_channels(folder: Path) -> int:
    """The channels of the images that the autoencoder in a folder encodes."""
    config = folder / "config.json"
    return int(read_json(config).get("in_channels", 3)) if config.is_file() else 3


def _from_hub(name: str) -> tuple[Path, str]:
    """The files of `organisation/name`, or of a folder in it, and the name with its commit."""
    repository, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    wanted = [f"{inside}/{file}".lstrip("/") for file in ("*.json", "*.safetensors")]
    folder = _snapshot("--autoencoder", repository, wanted, "give a folder or models:/..., or none for pixels")
    return folder / inside, f"{name}@{folder.name}"


def _snapshot(option: str, repository: str, wanted: Sequence[str], instead: str) -> Path:
    """The wanted files of a model on the hub; raises UserError, with what to do instead, if they cannot be fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(wanted)))
    except Exception as error:  # errors of requests, of the hub and of the disk
        problem = " ".join(str(error).split())[:160]
        raise UserError(
            f"{option} {repository} is not a folder and cannot be fetched from Hugging Face's hub ({problem}): "
            f"{instead}"
        ) from None
