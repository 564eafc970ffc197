"""Photographs that ship with scikit-image: an embedded dataset for demonstrations and experiments."""

from pathlib import Path

from patchloom.platform.files.storage import make_folder, write_atomic

# These photographs are in the wheel of scikit-image. They are CC0 or in the public domain.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")


def copy_photographs(folder: Path) -> Path:
    """Copy the photographs out of scikit-image, each into a folder of its own name, which is its class."""
    import skimage

    source = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        place = make_folder(folder / Path(name).stem) / name
        if not place.is_file():
            write_atomic(place, (source / name).read_bytes())
    return folder
