"""Untrusted images: only the documented formats are read, and no small file becomes a large one."""

import io
from pathlib import Path

import numpy as np
import pytest
from encoded import RGB, iccp, png, profile
from helpers import run_bounded
from PIL import Image

from patchloom.pipelines.prepare import images as decoding
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.prepare.images import MOST_WINDOWS, Transform, decode, is_grey, size_of

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 6, 3), dtype=np.uint8)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def saved(kind: str, pixels: np.ndarray = PIXELS) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def line_of_pixels() -> bytes:
    """65,500 x 1 pixels as a JPEG of less than 10 kB."""
    file = io.BytesIO()
    Image.new("RGB", (65_500, 1)).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "TIFF", "GIF"])
def test_documented_formats_are_read(kind: str) -> None:
    assert decode(saved(kind)).size == size_of(saved(kind)) == (6, 8)


@pytest.mark.parametrize("kind", ["EPS", "TGA", "PCX", "JPEG2000", "ICO", "ICNS", "PPM", "DDS", "SGI", "IM"])
def test_other_formats_are_refused(kind: str) -> None:
    content = EPS if kind == "EPS" else saved(kind)
    for read in (decode, size_of, is_grey):
        with pytest.raises(OSError, match="cannot identify"):  # EPS never reaches Ghostscript
            read(content)


def test_image_of_another_format_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, content in {
        "a.png": EPS,
        "b.jpg": saved("JPEG2000"),
        "c.tif": saved("TGA"),
        "d.png": saved("PNG"),
    }.items():
        (tmp_path / "photos" / name).write_bytes(content)
    dataset = prepare(str(tmp_path / "photos"), str(tmp_path / "data"), resolution=4, workers=0)
    assert list(dataset.rows([0])["key"]) == ["d.png"]
    assert (tmp_path / "data" / "skipped.jsonl").read_text().count("cannot identify image file") == 3


@pytest.mark.parametrize("crop", ["windows", "dhariwal"])
def test_line_of_pixels_does_not_become_a_wall(tmp_path: Path, crop: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "line.jpg").write_bytes(line_of_pixels())
    side = 64 if crop == "windows" else 2048
    done = run_bounded(
        "from patchloom.errors import UserError\nfrom patchloom.pipelines.prepare import prepare",
        f"""
try:
    prepare({str(tmp_path / "photos")!r}, {str(tmp_path / "data")!r}, resolution={side}, crop={crop!r},
            autoencoder="none", workers=0)
except UserError as error:
    print(error)
""",
        1024,
    )
    assert "after resizing" in done.stdout, done.stderr


def test_photograph_with_too_many_windows_is_refused() -> None:
    few = Transform(16, "windows", short_side=64, stride=1)
    assert sum(1 for _ in few.windows((64, 64))) == 4 * 17**2  # four regions of 32 pixels
    with pytest.raises(ValueError, match=f"{MOST_WINDOWS:,} windows"):
        few.windows((20_000, 1))


def test_photograph_with_too_many_windows_is_listed_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20_000, 1)).save(tmp_path / "photos" / "line.png")
    Image.fromarray(np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))).save(tmp_path / "photos" / "photo.png")
    prepare(str(tmp_path / "photos"), str(tmp_path / "data"), resolution=16, crop="windows", workers=0)
    assert f"{MOST_WINDOWS:,} windows" in (tmp_path / "data" / "skipped.jsonl").read_text()


def test_small_photographs_are_not_enlarged_to_windows(tmp_path: Path) -> None:
    photograph = np.kron(PIXELS, np.ones((8, 8, 1), np.uint8))
    (tmp_path / "photos").mkdir()
    Image.fromarray(PIXELS).save(tmp_path / "photos" / "thumbnail.png")
    Image.fromarray(photograph).save(tmp_path / "photos" / "photo.png")
    options = {"resolution": 16, "crop": "windows", "min_side": min(photograph.shape[:2]), "workers": 0}
    made = prepare(str(tmp_path / "photos"), str(tmp_path / "data"), **options)
    assert {key.rpartition("@")[0] for key in made.rows(range(len(made)))["key"]} == {"photo.png"}
    assert "thumbnail.png" in (tmp_path / "data" / "skipped.jsonl").read_text()


def test_cache_of_colour_profiles_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding._transform_to_srgb.cache_clear()
    for number in range(40):
        decode(png(PIXELS, RGB, before=iccp(profile(name=f"number {number}"))))
    assert decoding._transform_to_srgb.cache_info().currsize <= 16
    monkeypatch.setattr(decoding, "MOST_KEPT_PROFILE_BYTES", 10)
    expected = decode(png(PIXELS, RGB, before=iccp(profile(primaries="gbr"))))
    assert decoding._transform_to_srgb.cache_info().hits == 0
    assert decoding._transform_to_srgb.cache_info().misses == 40
    assert not np.array_equal(np.asarray(expected), PIXELS)  # the profile was applied


def test_array_with_too_many_pixels_is_refused() -> None:
    wide = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (100_000, 100_000, 3), (0, 0, 0))
    with pytest.raises(ValueError, match="decompression bomb"):
        decode(wide)


def test_large_image_of_16_bits_is_converted_in_bands() -> None:
    values = np.random.default_rng(1).integers(0, 2**16, (3000, 2000), dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    shown = np.asarray(decode(file.getvalue(), 1))
    assert np.array_equal(shown, np.rint(values / 257).astype(np.uint8))
