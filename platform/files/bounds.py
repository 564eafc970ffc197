"""Bounds: the most that a file from elsewhere may make this process keep, and how archives are unpacked within them."""

import errno
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from patchloom.errors import UserError

# The largest image that is decoded (Pillow's limit of pixels) in 16-bit RGB without compression, and its metadata.
MOST_IMAGE_BYTES = 640 << 20
MOST_ROWS = 1 << 20  # of a file that has fewer bytes
UNPACKED_BYTES, UNPACKED_RATIO = 1 << 30, 200  # images are compressed already


@contextmanager
def reading_damaged(name: object, what: str, remedy: str = "download it again") -> Iterator[None]:
    """Whatever the reader of a damaged file raises becomes a UserError, except errors of the disk.

    Args:
        name: the file.
        what: what it is not, such as "a complete zip file".
        remedy: what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # a seek to nowhere is damage
            raise
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{name} is not {what} ({problem}): {remedy}") from None


def check_image_bytes(size_bytes: int) -> int:
    """The size of an encoded image; raises ValueError if no image is as large."""
    if size_bytes > MOST_IMAGE_BYTES:
        raise ValueError(f"has {size_bytes:,} bytes, and an image has at most {MOST_IMAGE_BYTES:,}")
    return size_bytes


def check_rows(rows: int, file_bytes: int) -> int:
    """The number of rows of a file; raises ValueError if it has more rows than bytes, which could be a bomb."""
    if rows > max(file_bytes, MOST_ROWS):
        raise ValueError(f"claims {rows:,} rows in {file_bytes:,} bytes, which could be a decompression bomb")
    return rows


def most_unpacked_bytes(packed_bytes: int) -> int:
    """The most bytes that an archive of images may have after unpacking."""
    return UNPACKED_BYTES + UNPACKED_RATIO * packed_bytes


def read_image_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A member of a zip archive that is an image; raises ValueError if no image is as large."""
    member = archive.getinfo(name)
    check_image_bytes(max(member.file_size, member.compress_size))
    return archive.read(member)  # at most as many bytes as the directory says


def read_image(file: IO[bytes], size_bytes: int) -> bytes:
    """The next bytes of a file, which are an image; raises ValueError if no image is as large."""
    return file.read(check_image_bytes(size_bytes))
