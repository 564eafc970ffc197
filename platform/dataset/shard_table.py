"""The table of a dataset's shards: rows, bytes and checksums, in arrays instead of an object per shard."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from patchloom.errors import UserError
from patchloom.platform.files.inside import inner_name
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.records.dataset import DatasetCard, ShardFile

COPY_AGAIN = "copy the dataset again, or prepare it again in an empty folder"
SHARD_LIST = "shards.npy"
INLINE_SHARDS = 1024  # at most, in the card itself
LISTED_SHARD = np.dtype([("part", "<u4"), ("rows", "<u4"), ("bytes", "<u8"), ("sha256", "u1", (32,))])


@dataclass(frozen=True)
class ShardTable:
    """What the card of a dataset says about its shards.

    Args:
        rows: (S,) int64, rows of each shard.
        sizes: (S,) int64, bytes of each shard.
        sha256: (S, 32) uint8, the checksums.
        names: the path of each shard, relative to the dataset; or (S,) int64, the numbers in their names.
    """

    rows: np.ndarray
    sizes: np.ndarray
    sha256: np.ndarray
    names: Sequence[str] | np.ndarray

    @staticmethod
    def of_card(card: DatasetCard, folder: Path) -> "ShardTable":
        """The shards in a card, or in the list next to it, which is in this folder.

        Raises:
            UserError: a name is outside of the folder, a checksum is none, or the list is missing or damaged.
        """
        if card.shard_list is not None:
            path = folder / inner_name(card.shard_list.file, folder)
            check_sha256(path, card.shard_list.sha256)
            listed = np.load(path, allow_pickle=False)
            columns = (listed[name].astype(np.int64) for name in ("rows", "bytes", "part"))
            rows, sizes, parts = columns
            return ShardTable(rows, sizes, listed["sha256"].copy(), parts)
        try:
            digests = b"".join(bytes.fromhex(shard.sha256) for shard in card.shards)
            sha256 = np.frombuffer(digests, np.uint8).reshape(len(card.shards), 32)
        except ValueError:
            raise UserError(f"{folder}: dataset.json has a checksum that is no sha256: {COPY_AGAIN}") from None
        return ShardTable(
            rows=np.array([shard.rows for shard in card.shards], np.int64),
            sizes=np.array([shard.bytes for shard in card.shards], np.int64),
            sha256=sha256,
            names=[inner_name(shard.file, folder) for shard in card.shards],
        )

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, number: int) -> str:
        """The path of a shard, relative to the dataset."""
        name = self.names[number]
        return name if isinstance(name, str) else shard_name(int(name))

    def sha256_of(self, number: int) -> str:
        """The checksum of a shard, in hexadecimal."""
        return bytes(self.sha256[number]).hex()


def shard_name(part: int) -> str:
    """The path of a shard that `prepare` writes, relative to the dataset."""
    return f"shards/part-{part:05d}.arrow"


def check_sha256(path: Path, wanted: str) -> None:
    """Raise UserError if a file of a dataset is missing, or its checksum differs from the card."""
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {COPY_AGAIN}") from None
    if found != wanted:
        raise UserError(
            f"{path} was changed: its sha256 is {found[:12]}, and dataset.json says {wanted[:12]}; {COPY_AGAIN}"
        )


class ShardLister:
    """The list of the shards of a new dataset: 48 bytes per shard."""

    def __init__(self) -> None:
        self._records = bytearray()

    def __len__(self) -> int:
        return len(self._records) // LISTED_SHARD.itemsize

    def add(self, part: int, rows: int, size_bytes: int, sha256: str) -> None:
        """Add the next shard; `part` is the number in its name."""
        self._records += struct.pack("<IIQ32s", part, rows, size_bytes, bytes.fromhex(sha256))

    def inline(self) -> list[ShardFile]:
        """The shards as entries of the card."""
        return [
            ShardFile(file=shard_name(part), rows=rows, bytes=size_bytes, sha256=sha256.hex())
            for part, rows, size_bytes, sha256 in struct.iter_unpack("<IIQ32s", self._records)
        ]

    def content(self) -> bytes:
        """The content of the file that lists the shards: a .npy file with a record of fixed width for each shard."""
        content = BytesIO()
        np.lib.format.write_array(content, np.frombuffer(self._records, LISTED_SHARD), (1, 0), allow_pickle=False)
        return content.getvalue()
