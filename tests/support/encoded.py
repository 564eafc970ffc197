"""Image files made by hand, byte by byte, so that what is in them is known without the library that reads them."""

import struct
import zlib

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's colour types
PRIMARIES = {"r": (0.4361, 0.2225, 0.0139), "g": (0.3851, 0.7169, 0.0971), "b": (0.1431, 0.0606, 0.7141)}  # sRGB, D50


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(
    values: np.ndarray, colour: int, bits: int = 8, before: bytes = b"", size: tuple[int, int] | None = None
) -> bytes:
    """(H, W) or (H, W, C) values as a PNG file (RFC 2083); `before`: chunks in front of the pixels; `size`: a lie."""
    height, width = values.shape[:2]
    rows = values.reshape(height, -1).astype(np.uint16)
    if bits == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    elif bits == 8:
        packed = [row.astype(np.uint8).tobytes() for row in rows]
    else:  # several values a byte, the first in the highest bits
        each = 8 // bits
        padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % each))).reshape(height, -1, each)
        shifts = np.arange(8 - bits, -1, -bits)
        packed = [row.astype(np.uint8).tobytes() for row in (padded << shifts).sum(-1)]
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed))
    header = struct.pack(">IIBBBBB", *(size or (width, height)), bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + before
        + png_chunk(b"IDAT", pixels)
        + png_chunk(b"IEND", b"")
    )


def iccp(profile: bytes) -> bytes:
    """The chunk that gives a PNG its colour profile."""
    return png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(profile))


def profile(space: bytes = b"RGB ", primaries: str = "rgb", name: str = "by hand") -> bytes:
    """A colour profile (ICC.1:2001-04) whose values are proportional to light, with sRGB's primaries in any order."""

    def fixed(values: tuple[float, ...]) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = name.encode() + b"\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + b"\0" * 78
    linear = b"curv\0\0\0\0\0\0\0\0"  # no entries: the identity
    tags = {b"desc": described, b"cprt": b"text\0\0\0\0none\0", b"wtpt": fixed((0.9642, 1.0, 0.8249))}
    if space == b"GRAY":
        tags[b"kTRC"] = linear
    else:
        for channel, primary in zip("rgb", primaries, strict=True):
            tags[channel.encode() + b"XYZ"] = fixed(PRIMARIES[primary])
            tags[channel.encode() + b"TRC"] = linear
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content
    head = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"\0" * 4, 0x02400000, b"mntr", space, b"XYZ ", b"\0" * 12, b"acsp"
    )
    head += b"\0" * 28 + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def exif(orientation: int) -> bytes:
    """EXIF with nothing but an orientation: a little TIFF of one entry (tag 274, a short)."""
    return b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHHI", 274, 3, 1, orientation, 0, 0)


def in_srgb(light: np.ndarray) -> np.ndarray:
    """Light of 0 to 1 as sRGB's 8 bits (IEC 61966-2-1), not yet rounded."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)
