"""Texts: embeddings of the texts of images in an .npz file, by the keys of the images."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from patchloom.errors import UserError
from patchloom.platform.dataset.condition_source import condition_key
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import file_sha256

NO_TEXT = "no_text"  # the member of the file with the embedding of the empty text


class TextEmbeddings:
    """The text embeddings in a file, one array (tokens, width) per image, read when they are asked for.

    Args:
        address: an .npz file. Its members have the keys of the images, with or without their endings, and one is
            `no_text`, the embedding of the empty text.

    Raises:
        UserError: the file is missing or damaged, or has no `no_text`.
    """

    def __init__(self, address: str) -> None:
        folder, name = Folder.of_file(address)
        if not folder.has(name) or not name.endswith(".npz"):
            raise UserError(f"--text {address} is not an .npz file: give one with an embedding per key")
        self.path: Path = local_copy(folder.address, lambda other: other == name) / name
        try:
            self._file = np.load(self.path, allow_pickle=False)
            self._members = {condition_key(member): member for member in self._file.files}
            self.no_text = self._array(NO_TEXT)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"--text {address} cannot be used ({error}): it needs arrays (tokens, width), one of them {NO_TEXT}"
            ) from None
        self.shape = self.no_text.shape

    def sha256(self) -> str:
        """The sha256 of the file."""
        return file_sha256(self.path)

    def of(self, *keys: str) -> np.ndarray:
        """The embedding of a text, (tokens, width) float16; raises ValueError if there is none or it does not fit.

        Args:
            keys: the key of an image, and others that are tried if it has none.
        """
        members = (self._members.get(condition_key(key)) for key in keys)
        member = next((member for member in members if member is not None), None)
        if member is None:
            raise ValueError("has no text")
        found = self._array(member)
        if found.shape != self.shape:
            raise ValueError(f"its text has the shape {found.shape}, and the empty text {self.shape}")
        return found

    def _array(self, member: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            values: np.ndarray = np.asarray(self._file[member]).astype(np.float16)
        if values.ndim != 2 or not np.isfinite(values).all() or not values.any():
            raise ValueError(f"its text ({member}) must be (tokens, width) finite numbers in float16, not all zero")
        return values
