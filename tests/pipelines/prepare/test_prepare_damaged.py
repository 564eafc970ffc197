"""Damaged files of ten kinds among intact images: each is a row, or is listed with the reason."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encoded import GREY, RGB, exif, iccp, png, png_chunk
from helpers import photograph
from PIL import Image

from patchloom.pipelines.inspect import inspect
from patchloom.pipelines.prepare import prepare
from patchloom.platform.dataset import open_dataset

pytestmark = pytest.mark.ray
IMAGES, SIDE = 200, 32
# Root reads what nobody may read; without these two capabilities it is refused like everybody else.
UNPRIVILEGED = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: lost with the next program
os.execv(sys.executable, [sys.executable, "-m", "patchloom.pipelines.cli", *sys.argv[1:]])
"""


def good_images() -> dict[str, np.ndarray]:
    """Key to pixels of windows of a photograph."""
    pixels = photograph("chelsea.png")
    corners = [(y, x) for y in range(0, 260, 20) for x in range(0, 400, 25)][:IMAGES]
    return {f"cat/{n:03d}.png": pixels[y : y + SIDE, x : x + SIDE] for n, (y, x) in enumerate(corners)}


def animated(first: np.ndarray) -> bytes:
    frames = [Image.fromarray(first), Image.fromarray(255 - first)]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    return file.getvalue()


def broken(pixels: list[np.ndarray]) -> dict[str, bytes]:
    """The contents of damaged files. Those that can still be decoded show pixels[0], pixels[1], ... in this order."""
    listed = {
        "truncated": png(pixels[0], RGB)[:-600],
        "zero_bytes": b"",
        "text": b"this is not an image",
        "bomb": png(np.zeros((14_000, 14_000), np.uint8), GREY, 1),  # 24 kB that would be 196 million pixels
        "absurd": png(np.zeros((1, 1)), GREY, size=(2**31 - 1, 2**31 - 1)),
        "unreadable": png(pixels[0], RGB),
    }
    rows = {
        "wrong_extension": png(pixels[0], RGB),
        "broken_exif": png(pixels[1], RGB, 8, png_chunk(b"eXIf", exif(6)[6:16] + b"\xff" * 9)),
        "broken_icc": png(pixels[2], RGB, 8, iccp(b"no profile" * 30)),
        "animated": animated(pixels[3]),
    }
    return listed | rows


REASONS = {
    "truncated": "truncated",
    "zero_bytes": "cannot identify image file",
    "text": "cannot identify image file",
    "bomb": "decompression bomb",
    "absurd": "decompression bomb",
    "unreadable": "Permission denied",
}
ENDINGS = {"wrong_extension": "jpg", "animated": "webp"}


def test_five_percent_of_damaged_files_of_ten_kinds(tmp_path: Path) -> None:
    good = good_images()
    shown = list(good.values())[:4]
    source = tmp_path / "photos"
    for key, image in good.items():
        (source / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(source / key)
    damaged = broken(shown)
    assert len(damaged) == 10 == IMAGES * 0.05
    keys = {}
    for (name, content), key in zip(damaged.items(), list(good)[7::20], strict=True):  # they replace intact images
        (source / key).unlink()
        del good[key]
        keys[name] = f"{key[:-4]}_{name}.{ENDINGS.get(name, 'png')}"
        (source / keys[name]).write_bytes(content)
    (source / keys["unreadable"]).chmod(0)
    arguments = ["prepare", "photos", "data", "--resolution", str(SIDE), "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", UNPRIVILEGED, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "194 rows + 6 skipped = 200 inputs" in done.stdout.replace("\n", " ")
    assert done.stderr == ""

    skipped = [json.loads(line) for line in (tmp_path / "data" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in skipped] == sorted(keys[name] for name in REASONS)
    reasons = {entry["key"]: entry["error"] for entry in skipped}
    for name, reason in REASONS.items():
        assert reason in reasons[keys[name]], name
        assert str(tmp_path) not in reasons[keys[name]]

    wanted = good | dict(zip([keys[name] for name in damaged if name not in REASONS], shown, strict=True))
    rows = open_dataset(tmp_path / "data").rows(range(194))
    assert list(rows["key"]) == sorted(wanted)
    for key, image in zip(rows["key"], rows["image"], strict=True):
        assert np.array_equal(image.transpose(1, 2, 0), wanted[key]), key
    card = inspect(str(tmp_path / "data")).card
    assert (card["rows"], card["inputs"], card["skipped"]["count"]) == (194, 200, 6)
    assert os.access(tmp_path / "data" / "contact_sheet.png", os.R_OK)


def test_names_that_are_not_utf8_and_other_kinds_of_files_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", "b.jfif"):
        Image.new("RGB", (8, 8), "red").save(photos / name, "PNG" if name.endswith("png") else "JPEG")
    Path(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png")).write_bytes(b"")
    for name in ("c.heic", "d.heic", "notes.txt"):
        (photos / name).write_bytes(b"")
    dataset = prepare(str(photos), str(tmp_path / "pixels"), resolution=8, workers=0)
    card = dataset.card
    assert (card.rows, card.skipped.count, card.inputs) == (2, 1, 3)
    assert list(dataset.rows([0, 1])["key"]) == ["a.png", "b.jfif"]
    assert json.loads((tmp_path / "pixels" / "skipped.jsonl").read_text())["key"] == "caf\\xe9.png"
    assert ".heic 2, .txt 1" in "".join(capsys.readouterr())
