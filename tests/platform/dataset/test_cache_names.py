"""Names in the cache: a file whose CRC-32 and size equal another's never takes the place of its rows."""

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from patchloom.platform.dataset.readers import npz_images, plain_file
from patchloom.platform.files.folder import Folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def with_crc(content: bytes, wanted: int, place: int) -> bytes:
    """The content with 4 other bytes at a place, so that it has a wanted CRC-32, which is linear in its bits."""
    patched = bytearray(content)
    patched[place : place + 4] = bytes(4)
    base, rows = zlib.crc32(patched), list[tuple[int, int]]()
    for bit in range(32):
        patched[place : place + 4] = (1 << bit).to_bytes(4, "little")
        rows.append((zlib.crc32(patched) ^ base, 1 << bit))
    difference, bits = wanted ^ base, 0
    for column in range(32):  # Gaussian elimination over bits
        pivot = next(row for row in rows if row[0] >> column & 1)
        rows = [(r[0] ^ pivot[0], r[1] ^ pivot[1]) if r[0] >> column & 1 else r for r in rows if r is not pivot]
        if difference >> column & 1:
            difference, bits = difference ^ pivot[0], bits ^ pivot[1]
    patched[place : place + 4] = bits.to_bytes(4, "little")
    assert zlib.crc32(patched) == wanted and len(patched) == len(content)
    return bytes(patched)


def test_npz_with_the_checksum_of_another_has_its_own_rows(tmp_path: Path) -> None:
    images = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    file = io.BytesIO()
    np.save(file, images)
    forged = with_crc(file.getvalue()[:-64] + bytes(64), zlib.crc32(file.getvalue()), len(file.getvalue()) - 32)
    other = np.load(io.BytesIO(forged))
    for name, rows in (("one.npz", images), ("other.npz", other)):
        np.savez(tmp_path / name, images=rows)
    found = [np.array(npz_images(Folder(str(tmp_path)), name)) for name in ("one.npz", "other.npz")]
    assert np.array_equal(found[0], images) and np.array_equal(found[1], other) and not np.array_equal(images, other)


def tar_of(content: bytes) -> bytes:
    """A tar with one member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def test_gzip_with_the_checksum_of_another_has_its_own_members(tmp_path: Path) -> None:
    one = tar_of(b"1" * 512)
    other = with_crc(tar_of(b"2" * 512), zlib.crc32(one), 512 + 100)
    for name, content in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.tar.gz").write_bytes(gzip.compress(content, 0, mtime=0))
    for name, content in (("one", one), ("other", other)):
        with plain_file(Folder(str(tmp_path / name)), "a.tar.gz") as file:
            assert file.read() == content


def test_unpacked_file_is_used_again_until_it_is_replaced(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "a.npz"
    for value in (1, 2):
        np.savez(tmp_path / "new.npz", images=np.full((1, 2, 2, 3), value, np.uint8))
        os.utime(tmp_path / "new.npz", (0, 0))
        (tmp_path / "new.npz").replace(path)
        for _ in range(2):
            assert npz_images(Folder(str(tmp_path)), "a.npz")[0, 0, 0, 0] == value
        assert len(list((own_cache / "arrays").glob("*.lock"))) == value
