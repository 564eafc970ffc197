"""Put the emoji of an npm package into a folder for each category, as `patchloom prepare` reads them.

    python emoji.py emoji-datasource-google-16.0.0.tgz emoji-images

People and parts of bodies are left out: most of them are the same picture in several skin colours.
"""

import argparse
import json
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from pathlib import Path

LIST, IMAGES = "package/emoji.json", "package/img/google/64"
LEFT_OUT = ("People & Body", "Component")
DAMAGED = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, zlib.error, tarfile.TarError)


def main() -> int:
    """Unpack the images; prints how many each category has."""
    parser = argparse.ArgumentParser(description="Put emoji into a folder for each category.")
    parser.add_argument("package", type=Path, help="emoji-datasource-google-VERSION.tgz of the npm registry")
    parser.add_argument("out", type=Path, help="new folder for the images")
    asked = parser.parse_args()
    try:
        images = read_images(asked.package)
    except DAMAGED as error:
        problem = str(error).splitlines()[0]
        print(f"{asked.package} is not the package emoji-datasource-google ({problem}): download it", file=sys.stderr)
        return 2
    if asked.out.exists():
        print(f"{asked.out} exists: give a new folder", file=sys.stderr)
        return 2
    try:
        write_images(images, asked.out)
    except OSError as error:
        print(f"{asked.out} cannot be written ({error.strerror}): give another folder", file=sys.stderr)
        return 2
    counts = Counter(name.split("/")[0] for name in images)
    for category, count in sorted(counts.items()):
        print(f"{count:5,} {category}")
    print(f"{counts.total():5,} images in {asked.out}")
    return 0


def read_images(package: Path) -> dict[str, bytes]:
    """The PNG files of the package by `CATEGORY/IMAGE.png`: 5 MB.

    Raises:
        KeyError, ValueError, TypeError, AttributeError, OSError, tarfile.TarError: it is damaged, or another package.
    """
    with tarfile.open(package) as archive:
        content = {member.name: member for member in archive if member.isfile()}
        listed = json.loads(_read(archive, content[LIST]))
        chosen = [one for one in listed if one["has_img_google"] and one["category"] not in LEFT_OUT]
        return {
            f"{category_folder(one['category'])}/{Path(one['image']).name}": _read(
                archive, content[f"{IMAGES}/{one['image']}"]
            )
            for one in chosen
        }


def write_images(images: dict[str, bytes], out: Path) -> None:
    """Write the images to a new folder, which is whole or missing; raises OSError where it cannot be written."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as unfinished:
        for name, content in images.items():
            path = Path(unfinished) / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (Path(unfinished) / "images").rename(out)


def category_folder(category: str) -> str:
    """`Food & Drink` as the name of a folder: `food_and_drink`."""
    name = category.lower().replace(" & ", "_and_").replace(" ", "_")
    if not name.replace("_", "").isalnum():
        raise ValueError(f"the category {category!r} has a strange name")
    return name


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    return file.read()


if __name__ == "__main__":
    sys.exit(main())
