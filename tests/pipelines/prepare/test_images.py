"""Decoding: files of all common formats, from several encoders, become the 8-bit pixels that a viewer shows."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import tifffile
from encoded import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, exif, iccp, in_srgb, png, png_chunk, profile
from helpers import photograph
from PIL import Image

from patchloom.pipelines.prepare.images import decode, size_of

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (11, 7, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (11, 7, 1), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [20, 90, 200], [255, 255, 255], [0, 0, 0]])
PATCHES = np.kron(COLOURS.reshape(1, 7, 3), np.ones((16, 16, 1))).astype(np.uint8)  # blocks that JPEG keeps


def decoded_pixels(content: bytes | np.ndarray, channels: int = 3) -> np.ndarray:
    """(H, W, C) of the decoded image."""
    pixels = np.asarray(decode(content, channels))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(values: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def over_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha / 255
    return share * colours + (1 - share) * 255


@pytest.mark.parametrize(
    "content",
    [png(PIXELS, RGB), encoded(PIXELS, "PNG", optimize=True), encoded(PIXELS, "BMP"), tiff(PIXELS, photometric="rgb"),
     tiff(PIXELS, photometric="rgb", compression="zlib"), encoded(PIXELS, "TIFF", compression="tiff_lzw"),
     encoded(PIXELS, "WEBP", lossless=True), encoded(PIXELS, "WEBP", lossless=True, exif=exif(1)), PIXELS],
    ids=["PNG by hand", "PNG", "BMP", "TIFF", "TIFF zlib", "TIFF LZW", "WebP", "WebP with EXIF", "array"],
)  # fmt: skip
def test_lossless_files_keep_every_bit(content: bytes | np.ndarray) -> None:
    assert np.array_equal(decoded_pixels(content), PIXELS)
    assert size_of(content) == (7, 11)


@pytest.mark.parametrize(
    "options", [{"quality": 95}, {"quality": 95, "progressive": True}, {"quality": 90, "subsampling": 0}]
)
def test_jpeg_colours_are_close(options: dict[str, object]) -> None:
    content = encoded(PATCHES, "JPEG", **options)
    assert np.abs(decoded_pixels(content)[4:12].astype(int) - PATCHES[4:12])[:, 4:12].max() <= 4
    real = photograph("coffee.png")[:128, :128]
    assert np.abs(decoded_pixels(encoded(real, "JPEG", **options)).astype(int) - real).mean() < 4


def test_webp_colours_are_close() -> None:
    real = photograph("coffee.png")[:128, :128]
    assert np.abs(decoded_pixels(encoded(real, "WEBP", quality=90)).astype(int) - real).mean() < 5


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_of_any_depth_ranges_from_black_to_white(bits: int) -> None:
    most = 2**bits - 1
    values = np.linspace(0, most, 256).round().astype(int).reshape(16, 16)
    shown = decoded_pixels(png(values, GREY, bits))
    assert shown.shape == (16, 16, 3) and (shown == shown[..., :1]).all()
    assert np.abs(shown[..., 0] - values / most * 255).max() <= 0.5 + 1e-9
    assert np.array_equal(decoded_pixels(png(values, GREY, bits), channels=1)[..., 0], shown[..., 0])


@pytest.mark.parametrize(
    "content",
    [png(RAMP.astype(int) * 257, GREY, 16), tiff(RAMP.astype(np.uint16) * 257),
     tiff(RAMP.astype(">u2") * 257, byteorder=">"), tiff(RAMP), tiff(255 - RAMP, photometric="miniswhite"),
     tiff((255 - RAMP.astype(np.uint16)) * 257, photometric="miniswhite"),
     tiff(RAMP.astype(np.float32)), tiff((RAMP / 255).astype(np.float32)), encoded(RAMP, "BMP"), encoded(RAMP, "PNG")],
    ids=["PNG 16", "TIFF 16", "TIFF 16 big-endian", "TIFF 8", "TIFF white is zero", "TIFF 16 white is zero",
         "TIFF float 0..255", "TIFF float 0..1", "BMP", "PNG"],
)  # fmt: skip
def test_every_grey_level_is_kept(content: bytes) -> None:
    assert np.array_equal(decoded_pixels(content), RAMP[..., None].repeat(3, 2))
    assert np.array_equal(decoded_pixels(content, channels=1), RAMP[..., None])


@pytest.mark.parametrize("colour", [RGB, RGBA, GREY_ALPHA])
def test_sixteen_bit_colour_becomes_eight_bit(colour: int) -> None:
    channels = {RGB: 3, RGBA: 4, GREY_ALPHA: 2}[colour]
    values = RANDOM.integers(0, 65536, (11, 7, channels))
    if colour != RGB:
        values[..., -1] = 65535
    wanted = values[..., :1].repeat(3, 2) if colour == GREY_ALPHA else values[..., :3]
    # Pillow drops the low byte, where the nearest level would be another for a part of the values
    assert np.abs(decoded_pixels(png(values, colour, 16)) - wanted / 257).max() < 1


def test_floats_of_an_unknown_range_are_an_error() -> None:
    for values in (RAMP - 3.0, RAMP * 1e3):
        with pytest.raises(ValueError, match=r"floating-point"):
            decode(tiff(values.astype(np.float32)))


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int16])
def test_integers_of_an_unknown_range_are_an_error(kind: type) -> None:
    with pytest.raises(ValueError, match="integer"):
        decode(tiff(RAMP.astype(kind)))


def test_transparent_pixels_are_put_on_white() -> None:
    wanted = over_white(PIXELS, ALPHA)
    whole = np.concatenate([PIXELS, ALPHA], 2)
    for content in (png(whole, RGBA), encoded(whole, "WEBP", lossless=True, exact=True), encoded(whole, "TIFF"), whole):
        assert np.abs(decoded_pixels(content) - wanted).max() <= 1
    grey = np.concatenate([PIXELS[..., :1], ALPHA], 2)
    for content in (png(grey, GREY_ALPHA), grey):
        assert np.abs(decoded_pixels(content) - over_white(PIXELS[..., :1], ALPHA)).max() <= 1
        assert np.abs(decoded_pixels(content, channels=1) - over_white(PIXELS[..., :1], ALPHA)).max() <= 1


def test_palette_colours_and_transparency() -> None:
    numbers = RANDOM.integers(0, 5, (11, 7))
    colours = np.array([[10, 20, 30], [255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 200, 0]], np.uint8)
    palette = png_chunk(b"PLTE", colours.tobytes())
    for bits in (4, 8):
        assert np.array_equal(decoded_pixels(png(numbers, PALETTE, bits, palette)), colours[numbers])
    alpha = np.array([255, 0, 128, 64, 255], np.uint8)
    shown = decoded_pixels(png(numbers, PALETTE, 8, palette + png_chunk(b"tRNS", alpha.tobytes())))
    assert np.abs(shown - over_white(colours[numbers], alpha[numbers][..., None])).max() <= 1
    gif = Image.fromarray(numbers.astype(np.uint8), "L")
    gif.putpalette(colours.tobytes())
    assert np.array_equal(decoded_pixels(encoded(gif, "GIF")), colours[numbers])


def test_one_transparent_colour() -> None:
    key = png_chunk(b"tRNS", np.array([10, 20, 30], ">u2").tobytes())
    pixels = PIXELS.copy()
    pixels[3, 4] = (10, 20, 30)
    wanted = pixels.copy()
    wanted[3, 4] = 255
    assert np.array_equal(decoded_pixels(png(pixels, RGB, 8, key)), wanted)
    grey = png(RAMP, GREY, 8, png_chunk(b"tRNS", b"\0\x07"))
    assert decoded_pixels(grey)[0, 7].tolist() == [255] * 3 and decoded_pixels(grey)[0, 8].tolist() == [8] * 3


INKS = np.array([[0, 255, 255, 0], [255, 0, 255, 0], [255, 255, 0, 0], [0, 0, 0, 0], [0, 0, 0, 255]], np.uint8)
PRINTED = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]])


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind: str) -> None:
    blocks = np.kron(INKS.reshape(1, 5, 4), np.ones((16, 16, 1))).astype(np.uint8)
    content = encoded(Image.fromarray(blocks, "CMYK"), kind)
    assert np.abs(decoded_pixels(content)[8, 8::16].astype(int) - PRINTED).max() <= 3


# What is done to an upright image so that it is stored as EXIF's orientation says (EXIF 2.3, table 6: where row 0
# and column 0 of what is stored are seen)
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,  # top, left
    2: lambda image: image[:, ::-1],  # top, right
    3: lambda image: image[::-1, ::-1],  # bottom, right
    4: lambda image: image[::-1],  # bottom, left
    5: lambda image: image.transpose(1, 0, 2),  # left, top
    6: lambda image: image.transpose(1, 0, 2)[::-1],  # right, top
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
    8: lambda image: image.transpose(1, 0, 2)[:, ::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](PIXELS))
    tag = exif(orientation)
    for content in (
        png(stored, RGB, 8, png_chunk(b"eXIf", tag[6:])),
        encoded(stored, "WEBP", lossless=True, exif=tag),
        tiff(stored, photometric="rgb", extratags=[(274, 3, 1, orientation, True)]),
    ):
        assert np.array_equal(decoded_pixels(content), PIXELS)
        assert size_of(content) == (7, 11)
    blocks = np.ascontiguousarray(STORED[orientation](PATCHES))
    photo = encoded(blocks, "JPEG", quality=95, exif=tag)
    assert decoded_pixels(photo).shape == PATCHES.shape and size_of(photo) == (112, 16)
    assert np.abs(decoded_pixels(photo)[8, 8::16].astype(int) - COLOURS).max() <= 4


def test_damaged_exif_is_ignored() -> None:
    for broken in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(6)[:20], exif(9), exif(0)):
        assert np.array_equal(decoded_pixels(png(PIXELS, RGB, 8, png_chunk(b"eXIf", broken[6:]))), PIXELS)
        assert (
            np.abs(
                decoded_pixels(encoded(PATCHES, "JPEG", quality=95, exif=broken))[8, 8::16].astype(int) - COLOURS
            ).max()
            <= 4
        )


def test_profile_is_converted_to_srgb() -> None:
    linear = in_srgb(PIXELS / 255)
    assert np.abs(decoded_pixels(png(PIXELS, RGB, 8, iccp(profile()))) - linear).max() <= 2
    jpeg = decoded_pixels(encoded(PATCHES, "JPEG", quality=95, icc_profile=profile()))[8, 8::16]
    assert np.abs(jpeg - in_srgb(COLOURS / 255)).max() <= 14  # JPEG's error of one level in the dark is 13 of sRGB's
    swapped = decoded_pixels(png(PIXELS, RGB, 8, iccp(profile(primaries="grb"))))
    assert np.abs(swapped - linear[..., [1, 0, 2]]).max() <= 2


def test_profiles_of_grey_palette_and_transparent_images() -> None:
    grey = iccp(profile(b"GRAY"))
    assert np.abs(decoded_pixels(png(RAMP, GREY, 8, grey))[..., 0] - in_srgb(RAMP / 255)).max() <= 1
    assert np.abs(decoded_pixels(png(RAMP, GREY, 8, grey), channels=1)[..., 0] - in_srgb(RAMP / 255)).max() <= 1
    whole = np.concatenate([PIXELS, ALPHA], 2)
    wanted = over_white(in_srgb(PIXELS / 255), ALPHA)
    assert np.abs(decoded_pixels(png(whole, RGBA, 8, iccp(profile()))) - wanted).max() <= 3
    numbers = RANDOM.integers(0, 7, (11, 7))
    palette = png_chunk(b"PLTE", COLOURS.astype(np.uint8).tobytes())
    shown = decoded_pixels(png(numbers, PALETTE, 8, iccp(profile()) + palette))
    assert np.abs(shown - in_srgb(COLOURS / 255)[numbers]).max() <= 2


def test_srgb_profile_changes_no_pixel() -> None:
    from PIL import ImageCms

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(decoded_pixels(encoded(PIXELS, "PNG", icc_profile=srgb)), PIXELS)


@pytest.mark.parametrize("broken", [b"garbage", profile()[:200], profile(b"GRAY"), b""])
def test_wrong_profile_is_ignored(broken: bytes) -> None:
    assert np.array_equal(decoded_pixels(png(PIXELS, RGB, 8, iccp(broken))), PIXELS)


def test_grey_is_the_luma() -> None:
    wanted = PIXELS @ np.array([0.299, 0.587, 0.114])  # Rec. 601
    assert np.abs(decoded_pixels(png(PIXELS, RGB), channels=1)[..., 0] - wanted).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_becomes_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (7, 11), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    shown = decoded_pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert shown.shape == (11, 7, 3) and (shown == (255, 0, 0)).all()


def test_too_many_pixels_are_an_error_before_decoding() -> None:
    most = Image.MAX_IMAGE_PIXELS
    for side in (int(most**0.5) + 1, int((1.9 * most) ** 0.5)):
        with pytest.raises(ValueError, match="decompression bomb"):
            decode(png(np.zeros((1, 1)), GREY, size=(side, side)))
        with pytest.raises(ValueError, match="decompression bomb"):
            size_of(png(np.zeros((1, 1)), GREY, size=(side, side)))
    with pytest.raises(Image.DecompressionBombError):
        decode(png(np.zeros((1, 1)), GREY, size=(2**30, 2**30)))
