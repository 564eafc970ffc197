"""Images: encoded bytes to 8-bit pixels as a person sees them, cropped and resized."""

import contextlib
import io
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

CROPS = ("center", "dhariwal", "none", "windows")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
MODES = {1: "L", 3: "RGB"}
IN_SRGB = {"RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "L": "RGB"}  # what a profile's colours become
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 0  # of Pillow's guard, which only warns up to twice as many
ORIENTATIONS = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}  # where Pillow finds one, but in TIFF
FLAT_STD = 10.0  # a window whose pixels vary less teaches nothing
DARK_MEAN = 20.0


@dataclass(frozen=True)
class Transform:
    """What happens to an image: how it is cropped and resized, and, for windows, where they are cut.

    Pillow's filters widen with the reduction, so that resizing is antialiased. Windows: the photograph is
    resized to a short side of `short_side`, divided into regions of about two windows a side, and every
    region into overlapping windows `stride` pixels apart. A region is held out or trained on as a whole.
    """

    resolution: int
    crop: str = "center"
    resize: str = "lanczos"
    antialias: bool = True
    channels: int = 3
    min_side: int = 0  # smaller images are left out
    short_side: int | None = None
    stride: int | None = None

    def apply(self, image: Image.Image) -> np.ndarray:
        """(R, R, C) uint8 of a decoded image; ValueError says why it cannot be used."""
        if min(image.size) < self.min_side:
            raise ValueError(f"is {image.width}x{image.height}, smaller than --min-side {self.min_side}")
        square = {"none": self._as_it_is, "dhariwal": self._as_adm}.get(self.crop, self._centre)(image)
        pixels = np.asarray(square)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _as_it_is(self, image: Image.Image) -> Image.Image:
        side = self.resolution
        if image.size != (side, side):
            raise ValueError(f"is {image.width}x{image.height}; --crop none takes {side}x{side} images as they are")
        return image

    def _centre(self, image: Image.Image) -> Image.Image:
        """The largest square in the middle, resized."""
        side, square = self.resolution, min(image.size)
        left, top = (image.width - square) // 2, (image.height - square) // 2
        if image.size != (square, square):
            image = image.crop((left, top, left + square, top + square))
        return image if square == side else image.resize((side, side), FILTERS[self.resize])

    def _as_adm(self, image: Image.Image) -> Image.Image:
        """ADM's: halved by a box filter while twice too large, then bicubic, then the middle."""
        side = self.resolution
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of a photograph that windows are cut from."""
        short = self.short_side or min(size)
        scale = short / min(size)
        return max(short, round(size[0] * scale)), max(short, round(size[1] * scale))

    def windows(self, size: tuple[int, int]) -> list[tuple[str, int, int]]:
        """(region, y, x) of every window of a photograph of this size (width, height)."""
        (width, height), side, stride = self.fitted(size), self.resolution, self.stride or 1
        return [
            (region, y, x)
            for region, top, bottom, left, right in _regions(height, width, 2 * side)
            for y in range(top, bottom - side + 1, stride)
            for x in range(left, right - side + 1, stride)
        ]

    def photograph(self, image: Image.Image) -> np.ndarray:
        """The pixels that windows are cut from, (H, W, C) uint8."""
        pixels = np.asarray(image.resize(self.fitted(image.size), FILTERS[self.resize]))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def window(self, photograph: np.ndarray, y: int, x: int) -> np.ndarray:
        """One window, (R, R, C) uint8; ValueError where there is nothing to see in it."""
        window = photograph[y : y + self.resolution, x : x + self.resolution]
        if window.mean() < DARK_MEAN:
            raise ValueError(f"near-black window (mean below {DARK_MEAN:g})")
        if window.std() < FLAT_STD:
            raise ValueError(f"flat window (standard deviation below {FLAT_STD:g})")
        return window


def _regions(height: int, width: int, side: int) -> list[tuple[str, int, int, int, int]]:
    """(name, top, bottom, left, right) of a grid of regions of at least `side` pixels, or of one region."""
    rows, columns = max(1, height // side), max(1, width // side)
    return [
        (f"{r},{c}", height * r // rows, height * (r + 1) // rows, width * c // columns, width * (c + 1) // columns)
        for r in range(rows)
        for c in range(columns)
    ]


def decode(content: bytes | np.ndarray, channels: int = 3) -> Image.Image:
    """An encoded image, or an (H, W[, C]) uint8 array, as 8-bit RGB (or grey) the way a viewer shows it.

    Upright by its EXIF orientation, colours by its ICC profile, transparency over white, 16 bits scaled to 8,
    the first frame of an animation. Raises what Pillow raises for damaged data, and ValueError for pixels whose
    range is unknown or more of them than Pillow's own guard allows.
    """
    if isinstance(content, np.ndarray):
        return _eight_bits(Image.fromarray(content.squeeze(-1) if content.shape[-1:] == (1,) else content), channels)
    with _opened(content) as image:
        image.load()
        return _eight_bits(_in_srgb(_upright(image)), channels)


def size_of(content: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) as `decode` will give it, from the header alone."""
    if isinstance(content, np.ndarray):
        return content.shape[1], content.shape[0]
    with _opened(content) as image:
        return _upright(image).size


def _opened(content: bytes) -> Image.Image:
    """The image of a file whose header was read; ValueError for more pixels than Pillow takes without a warning."""
    with contextlib.suppress(Image.DecompressionBombWarning):  # raised where warnings are errors
        image = Image.open(io.BytesIO(content))
        if image.width * image.height <= MOST_PIXELS:
            return image
    raise ValueError(f"has more than {MOST_PIXELS:,} pixels, which could be a decompression bomb")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; EXIF that cannot be read turns nothing."""
    if image.format != "TIFF" and ORIENTATIONS.isdisjoint(image.info):  # a copy of every image would cost a tenth
        return image
    with contextlib.suppress(Exception):  # Pillow raises half a dozen kinds here, and the pixels are whole
        return ImageOps.exif_transpose(image)
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """The colours that an embedded profile means, as sRGB; a profile that cannot be read is as none."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":  # the profile speaks of the palette's colours
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in IN_SRGB:
        return image
    try:
        transform = _transform_to_srgb(bytes(profile), image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@cache
def _transform_to_srgb(profile: bytes, mode: str) -> Any:
    """Pillow's transform; None where the profile is sRGB itself, whose pixels must stay what they are."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode != "CMYK" and "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    # lcms tabulates a curve of grey coarsely: in the dark that was seen to be nine levels off
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, IN_SRGB[mode], flags=flags)


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """8-bit RGB or grey of any of Pillow's modes."""
    if image.mode in SIXTEEN_BITS:
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(values.clip(0, 65535) / 257).astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray(_from_floats(np.asarray(image)))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        shown = image.convert("RGBA")
        white = Image.new("RGBA", shown.size, "white")
        image = Image.alpha_composite(white, shown).convert("RGB")
    wanted = MODES[channels]
    return image if image.mode == wanted else image.convert(wanted)


def _from_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"has floating-point pixels from {low:g} to {high:g}, whose range is unknown")
    scaled: np.ndarray = np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    return scaled
