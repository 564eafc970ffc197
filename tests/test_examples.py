"""The examples: their scripts on small inputs, and their recipes."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patchloom.platform.recipe import load_recipe
from patchloom.platform.recipe.search import load_search

EMOJI = Path(__file__).parent.parent / "examples" / "emoji"
ENTRIES = [  # image, category, whether it has a picture, whether it is used
    ("1f600", "Smileys & Emotion", True, True), ("1f37a", "Food & Drink", True, True),
    ("1f34e", "Food & Drink", True, True),
    ("1f468", "People & Body", True, False), ("1f3fb", "Component", True, False), ("1f47d", "Flags", False, False),
]  # fmt: skip


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def package(path: Path, leave_out: str = "") -> Path:
    """A package of npm's with a square of its own colour for each entry."""
    listed: list[dict[str, Any]] = [
        {"image": f"{name}.png", "category": category, "has_img_google": has_picture}
        for name, category, has_picture, _ in ENTRIES
    ]
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "package/emoji.json", json.dumps(listed).encode())
        for name, *_ in ENTRIES:
            if name != leave_out:
                content = io.BytesIO()
                colour = tuple(int(name, 16) >> shift & 255 for shift in (0, 8, 16))
                Image.new("RGB", (64, 64), colour).save(content, "PNG")
                add(archive, f"package/img/google/64/{name}.png", content.getvalue())
    return path


def emoji(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, EMOJI / "emoji.py", *words], capture_output=True, text=True, check=False)


def test_emoji_are_put_into_folders_by_category(tmp_path: Path) -> None:
    done = emoji(package(tmp_path / "package.tgz"), tmp_path / "images")
    assert done.returncode == 0 and "3 images" in done.stdout
    found = {str(path.relative_to(tmp_path / "images")) for path in (tmp_path / "images").rglob("*.png")}
    assert found == {"smileys_and_emotion/1f600.png", "food_and_drink/1f37a.png", "food_and_drink/1f34e.png"}
    pixel = np.asarray(Image.open(tmp_path / "images" / "food_and_drink" / "1f37a.png"))[0, 0]
    assert pixel.tolist() == [0x7A, 0xF3, 0x01]


@pytest.mark.parametrize(
    "fault", ["exists", "no package", "an image is missing", "no list", "no category", "no folder"]
)
def test_emoji_that_cannot_be_written_are_a_line_and_leave_no_folder(tmp_path: Path, fault: str) -> None:
    source = package(tmp_path / "package.tgz", leave_out="1f37a" if fault == "an image is missing" else "")
    if fault == "no package":
        source.write_bytes(b"<html>not found</html>")
    if fault in ("no list", "no category"):
        content: Any = {"emoji": 1} if fault == "no list" else [{"has_img_google": True, "category": None}]
        with tarfile.open(source, "w:gz") as archive:
            add(archive, "package/emoji.json", json.dumps(content).encode())
    if fault == "exists":
        (tmp_path / "images").mkdir()
    done = emoji(source, source / "images" if fault == "no folder" else tmp_path / "images")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert ("cannot be written" in done.stderr) == (fault == "no folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == (["images"] if fault == "exists" else []) + [
        "package.tgz"
    ]


def test_the_search_of_the_emoji_compares_what_the_recipe_trains() -> None:
    recipe, (search, base) = load_recipe(EMOJI / "recipe.yaml"), load_search(EMOJI / "search.yaml")
    assert base == recipe and search.repeats == 3
    assert [setting["patches.p"] for setting in search.settings()] == [recipe.patches.p, 1]
