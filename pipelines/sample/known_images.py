"""Known images: the image that out-painting or in-painting keeps in every sample, and its mask."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.generate import Sampling
from patchloom.models.inpainting import KnownPixels
from patchloom.pipelines.pages.pictures import png_bytes, png_pixels
from patchloom.pipelines.prepare.images import decode
from patchloom.pipelines.sample.options import SampleOptions
from patchloom.platform.files.folder import Folder
from patchloom.platform.records.samples import KeptImage

KEPT_FROM = 128  # grey values of a mask from here on are white


@dataclass(frozen=True)
class KnownImage:
    """An image that is kept in part, on the canvas of the samples.

    Args:
        image: (C, H, W) uint8, of the size of the samples; black where nothing is kept.
        mask: (H, W) bool, true where pixels are kept.
        method: how the others are sampled.
        record: what `sampling.json` says of it.
    """

    image: np.ndarray
    mask: np.ndarray
    method: str
    record: KeptImage

    def pixels(self) -> KnownPixels:
        """The pixels as the network gets them."""
        return KnownPixels(torch.from_numpy(self.image), torch.from_numpy(self.mask), self.method)

    def png(self) -> bytes:
        """A picture that is transparent where nothing is kept."""
        return png_bytes(np.concatenate([self.image, self.mask[None].astype(np.uint8) * 255]))


def pixels_of_png(content: bytes, method: str) -> KnownPixels:
    """The pixels of `KnownImage.png`."""
    pixels = torch.from_numpy(png_pixels(content).copy())
    return KnownPixels(pixels[:-1], pixels[-1] > 0, method)


def read_known_image(options: SampleOptions, sampling: Sampling, card: ModelCard) -> tuple[KnownImage | None, Sampling]:
    """Read the image of `--outpaint` or `--inpaint`.

    Args:
        options: the options of `sample`.
        sampling: the options of the sampler.
        card: the model's.

    Returns:
        The image, or None without these options; and the options of the sampler, with the size of `--inpaint`.

    Raises:
        UserError: a file cannot be read, or does not fit.
    """
    is_grey = card.normalisation.kind == "pixels" and card.denoiser.channels == 1
    if options.outpaint is not None:
        return _centered(options.outpaint, options, card.downscale, is_grey), sampling
    if options.inpaint is None or options.mask is None:
        return None, sampling
    known = _masked(options.inpaint, options.mask, options, is_grey)
    height, width = known.mask.shape
    if (sampling.size or (height, width)) != (height, width):
        raise UserError(f"--inpaint {options.inpaint} is {height}x{width}: leave --size out, or give this size")
    is_trained_size = height == width == card.image_side
    return known, sampling if is_trained_size else replace(sampling, size=(height, width))


def _centered(address: str, options: SampleOptions, downscale: int, is_grey: bool) -> KnownImage:
    """The image in the center of the canvas."""
    if options.size is None:
        raise UserError(f"--outpaint {address} needs a larger canvas: give its --size HxW")
    image, sha256 = _read_image(f"--outpaint {address}", address, is_grey)
    (height, width), (canvas_height, canvas_width) = image.shape[1:], options.size
    for inner, outer in ((height, canvas_height), (width, canvas_width)):
        if inner > outer or (outer - inner) % (2 * downscale) or inner % downscale:
            raise UserError(
                f"--outpaint {address}: {height}x{width} pixels do not fit into the center of "
                f"{canvas_height}x{canvas_width}; the image and its margins must be multiples of {downscale} pixels"
            )
    if (height, width) == (canvas_height, canvas_width):
        raise UserError(f"--outpaint {address} fills all of --size {height}x{width}: choose a larger one")
    top, left = (canvas_height - height) // 2, (canvas_width - width) // 2
    middle = (..., slice(top, top + height), slice(left, left + width))
    canvas, mask = np.zeros((len(image), *options.size), np.uint8), np.zeros(options.size, bool)
    canvas[middle], mask[middle] = image, True
    return KnownImage(canvas, mask, options.outpaint_method, KeptImage(sha256=sha256, method=options.outpaint_method))


def _masked(address: str, mask_address: str, options: SampleOptions, is_grey: bool) -> KnownImage:
    """The image, kept where the mask is white."""
    image, sha256 = _read_image(f"--inpaint {address}", address, is_grey)
    grey, mask_sha256 = _read_image(f"--mask {mask_address}", mask_address, is_grey=True)
    mask = grey[0] >= KEPT_FROM
    if mask.shape != image.shape[1:]:
        found, wanted = ("x".join(map(str, shape)) for shape in (mask.shape, image.shape[1:]))
        raise UserError(
            f"--mask {mask_address} is {found}, and --inpaint {address} is {wanted}: give a mask of this size"
        )
    if mask.all() or not mask.any():
        colour, rest = ("white", "sampled: paint black what") if mask.all() else ("black", "kept: paint white what")
        raise UserError(f"--mask {mask_address} is {colour} everywhere, so nothing would be {rest} should be")
    record = KeptImage(sha256=sha256, mask_sha256=mask_sha256, method=options.outpaint_method)
    return KnownImage(image * mask, mask, options.outpaint_method, record)


def _read_image(option: str, address: str, is_grey: bool) -> tuple[np.ndarray, str]:
    """An image file as (C, H, W) uint8, and the sha256 of the file."""
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"{option}: there is no such file")
    content = folder.read(name)
    try:
        pixels = np.asarray(decode(content, 1 if is_grey else 3))
    except Exception as error:  # Pillow raises many types
        raise UserError(f"{option} cannot be read as an image ({error})") from None
    return pixels[None] if is_grey else pixels.transpose(2, 0, 1), hashlib.sha256(content).hexdigest()
