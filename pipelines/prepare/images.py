"""Images: from encoded bytes to 8-bit pixels as a viewer shows them, cropped and resized."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

# Pillow reads many more, some of them with other programs (EPS with Ghostscript)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
CROPS = ("center", "dhariwal", "none", "windows")
FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
MODES = {1: "L", 3: "RGB"}
IN_SRGB = {"RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB", "L": "RGB"}  # the mode after the colour profile is applied
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
GREY_MODES = ("1", "L", "LA", "La", "I", "F", *SIXTEEN_BITS)
PHOTOMETRIC, WHITE_IS_ZERO, INVERTED = 262, 0, "white is zero"  # a tag of TIFF and its value
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 0  # Pillow itself only warns up to twice as many
TOO_MANY_PIXELS = f"has more than {MOST_PIXELS:,} pixels, which could be a decompression bomb"
ORIENTATIONS = {
    "exif",
    "Raw profile type exif",
    "XML:com.adobe.xmp",
    "xmp",
}  # except in TIFF
FLAT_STD, DARK_MEAN = 10.0, 20.0  # windows below these are skipped
MOST_WINDOWS = 1 << 22  # of a photograph
KEPT_PROFILES, MOST_KEPT_PROFILE_BYTES = 16, 4 << 20  # colour profiles in the cache; larger ones are not kept
WINDOW_MARK = "@"  # before the window in the key of a window of a photograph
BAND_VALUES = 1 << 22  # values that are converted at once


@dataclass(frozen=True)
class Transform:
    """How an image is cropped and resized.

    Resizing is antialiased: Pillow's filters widen with the reduction. For crop "windows", the photograph is resized
    to `short_side` and divided into regions of about two windows per side, and each region into overlapping windows,
    `stride` pixels apart. All windows of a region are in the same split.
    """

    resolution: int
    crop: str = "center"
    resize: str = "lanczos"
    antialias: bool = True
    channels: int = 3
    min_side: int = 0  # smaller images are skipped
    short_side: int | None = None
    stride: int | None = None

    def apply(self, image: Image.Image) -> np.ndarray:
        """Crop and resize a decoded image to (R, R, C) uint8; raises ValueError if it cannot be used."""
        self._check_side(image.size)
        square = {"none": self._unchanged, "dhariwal": self._dhariwal}.get(self.crop, self._center)(image)
        pixels = np.asarray(square)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def _check_side(self, size: tuple[int, int]) -> None:
        if min(size) < self.min_side:
            raise ValueError(f"is {size[0]}x{size[1]}, smaller than --min-side {self.min_side}")

    def _unchanged(self, image: Image.Image) -> Image.Image:
        side = self.resolution
        if image.size != (side, side):
            raise ValueError(f"is {image.width}x{image.height}; --crop none takes {side}x{side} images as they are")
        return image

    def _center(self, image: Image.Image) -> Image.Image:
        """The largest centered square, resized."""
        side, square = self.resolution, min(image.size)
        left, top = (image.width - square) // 2, (image.height - square) // 2
        if image.size != (square, square):
            image = image.crop((left, top, left + square, top + square))
        return image if square == side else image.resize((side, side), FILTERS[self.resize])

    def _dhariwal(self, image: Image.Image) -> Image.Image:
        """ADM's crop: halve with a box filter while twice too large, resize bicubically, and take the center."""
        side = self.resolution
        while min(image.size) >= 2 * side:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = side / min(image.size)
        size = _bounded((round(image.width * scale), round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side))

    def resized_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of a photograph after resizing for windows; raises ValueError if it is too large."""
        short = self.short_side or min(size)
        scale = short / min(size)
        return _bounded((max(short, round(size[0] * scale)), max(short, round(size[1] * scale))))

    def windows(self, size: tuple[int, int]) -> Iterator[tuple[str, int, int]]:
        """(region, y, x) of every window of a photograph of (width, height); raises ValueError if it cannot be used.

        There may be millions, which are not kept in memory.
        """
        self._check_side(size)
        (width, height), side, stride = self.resized_size(size), self.resolution, self.stride or 1
        if width * height > MOST_WINDOWS * stride**2:
            raise ValueError(f"has {width}x{height} pixels after resizing, with more than {MOST_WINDOWS:,} windows")
        return (
            (region, y, x)
            for region, top, bottom, left, right in _regions(height, width, 2 * side)
            for y in range(top, bottom - side + 1, stride)
            for x in range(left, right - side + 1, stride)
        )

    def photograph(self, image: Image.Image) -> np.ndarray:
        """A photograph resized for windows, (H, W, C) uint8."""
        pixels = np.asarray(image.resize(self.resized_size(image.size), FILTERS[self.resize]))
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def window(self, photograph: np.ndarray, y: int, x: int) -> np.ndarray:
        """One window, (R, R, C) uint8; raises ValueError if it is dark or flat."""
        window = photograph[y : y + self.resolution, x : x + self.resolution]
        if window.mean() < DARK_MEAN:
            raise ValueError(f"near-black window (mean below {DARK_MEAN:g})")
        if window.std() < FLAT_STD:
            raise ValueError(f"flat window (standard deviation below {FLAT_STD:g})")
        return window


def photograph_key(key: str) -> str:
    """The key of the photograph of a window."""
    return key.rsplit(WINDOW_MARK, 1)[0]


def _bounded(size: tuple[int, int]) -> tuple[int, int]:
    """The size of a resized image; raises ValueError if it is larger than an image may be: a line becomes a wall."""
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"has {size[0]}x{size[1]} pixels after resizing, and {MOST_PIXELS:,} are the most")
    return size


def _regions(height: int, width: int, side: int) -> Iterator[tuple[str, int, int, int, int]]:
    """(name, top, bottom, left, right) of a grid of regions of at least `side` pixels; at least one region."""
    rows, columns = max(1, height // side), max(1, width // side)
    return (
        (f"{r},{c}", height * r // rows, height * (r + 1) // rows, width * c // columns, width * (c + 1) // columns)
        for r in range(rows)
        for c in range(columns)
    )


def decode(content: bytes | np.ndarray, channels: int = 3) -> Image.Image:
    """Decode an image as a viewer shows it.

    It applies the EXIF orientation and the ICC profile, puts transparent images on white, scales 16 bits to 8, and
    takes the first frame of an animation.

    Args:
        content: an encoded image, or an (H, W[, C]) uint8 array.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ValueError: the range of the pixels is unknown, or there are more pixels than Pillow allows.
        Exception: Pillow's own errors for damaged data.
    """
    if isinstance(content, np.ndarray):
        _checked(content.shape[1], content.shape[0])
        return _eight_bits(Image.fromarray(content.squeeze(-1) if content.shape[-1:] == (1,) else content), channels)
    with _opened(content) as image:
        image.load()
        _note_range(image)
        return _eight_bits(_in_srgb(_upright(image)), channels)


def size_of(content: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) of the decoded image, read from the header."""
    if isinstance(content, np.ndarray):
        return content.shape[1], content.shape[0]
    with _opened(content) as image:
        return _upright(image).size


def is_grey(content: bytes) -> bool:
    """Whether an encoded image has no colours, read from the header."""
    with _opened(content) as image:
        return image.mode in GREY_MODES


def _opened(content: bytes) -> Image.Image:
    """Read the header of an image; raises ValueError for more pixels than Pillow allows without a warning."""
    with contextlib.suppress(Image.DecompressionBombWarning):  # an exception if warnings are errors
        image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
        _checked(*image.size)
        return image
    raise ValueError(TOO_MANY_PIXELS)


def _checked(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ValueError(TOO_MANY_PIXELS)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Damaged EXIF data is ignored."""
    if image.format != "TIFF" and ORIENTATIONS.isdisjoint(image.info):  # saves a copy of the image, a tenth of the time
        return image
    with contextlib.suppress(Exception):  # Pillow raises many types here, and the pixels are intact
        return ImageOps.exif_transpose(image)
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Convert from the embedded colour profile to sRGB. Damaged profiles are ignored."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":  # the profile is for the colours of the palette
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode not in IN_SRGB:
        return image
    find = _transform_to_srgb if len(profile) <= MOST_KEPT_PROFILE_BYTES else _transform_to_srgb.__wrapped__
    try:
        transform = find(bytes(profile), image.mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(KEPT_PROFILES)
def _transform_to_srgb(profile: bytes, mode: str) -> Any:
    """Pillow's transform; None if the profile is sRGB, whose pixels must not change."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode != "CMYK" and "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    # the optimised transform of grey is up to nine levels off in dark pixels
    flags = ImageCms.Flags.NOOPTIMIZE if mode == "L" else ImageCms.Flags.NONE
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, IN_SRGB[mode], flags=flags)


def _eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """Convert any mode of Pillow to 8-bit RGB or grey."""
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        image = Image.fromarray(_from_integers(image))
    elif image.mode == "F":
        image = Image.fromarray(_from_floats(np.asarray(image)))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        image = Image.alpha_composite(white, layer).convert("RGB")
    wanted = MODES[channels]
    return image if image.mode == wanted else image.convert(wanted)


def _from_integers(image: Image.Image) -> np.ndarray:
    """16 bits to 8."""
    values, inverted = np.asarray(image), INVERTED in image.info
    shown = np.empty(values.shape, np.uint8)
    rows = max(1, BAND_VALUES // values.shape[1])  # a large image in float64 would take gigabytes
    for top in range(0, len(values), rows):
        band = values[top : top + rows].astype(np.float64).clip(0, 65535)
        shown[top : top + rows] = np.rint((65535 - band if inverted else band) / 257)
    return shown


def _note_range(image: Image.Image) -> None:
    """Refuse integers without a known range, and note a grey that is stored inverted, before a copy loses the tags."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # these have at most 16 bits
        raise ValueError("has 32-bit integer pixels, whose range is unknown")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode in SIXTEEN_BITS:
        image.info[INVERTED] = True  # Pillow itself inverts up to 8 bits


def _from_floats(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"has floating-point pixels from {low:g} to {high:g}, whose range is unknown")
    scaled: np.ndarray = np.rint(values * 255 if high <= 1 else values).astype(np.uint8)
    return scaled
