"""Pictures: contact sheets that are looked at before any number is read."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from patchloom.platform.files.storage import write_atomic

GAP = 2
PICTURE_MARK = b"tEXtSoftware\0Patchloom"


def contact_sheet(images: np.ndarray, columns: int = 8, scale: int = 1) -> Image.Image:
    """(N, C, H, W) uint8 images, grey or RGB, as one picture on white; each pixel `scale` pixels wide."""
    count, _, height, width = images.shape
    columns = max(1, min(columns, count))
    rows = (count + columns - 1) // columns
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + GAP), (index % columns) * (width + GAP)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(sheet)
    if scale > 1:
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    return picture


def png_bytes(image: np.ndarray) -> bytes:
    """One (C, H, W) uint8 image as the bytes of a PNG; grey where C is 1."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def png_pixels(content: bytes) -> np.ndarray:
    """(C, H, W) uint8 of a PNG's bytes."""
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a PNG whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    mark = PngInfo()
    mark.add_text("Software", "Patchloom")
    picture.save(content, format="PNG", pnginfo=mark)
    write_atomic(path, content.getvalue())


def is_own_picture(content: bytes) -> bool:
    """Whether `save_png` wrote this file."""
    return PICTURE_MARK in content


def side_by_side(rows: Sequence[np.ndarray], scale: int = 1) -> Image.Image:
    """Several (N, 3, H, W) batches of the same length, one below the other: originals above what became of them."""
    return contact_sheet(np.concatenate(rows), columns=len(rows[0]), scale=scale)
