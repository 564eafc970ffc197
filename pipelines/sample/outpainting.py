"""Outpainting: the image that fills the center of larger samples."""

import hashlib

import numpy as np

from patchloom.errors import UserError
from patchloom.pipelines.prepare.images import decode
from patchloom.platform.files.folder import Folder


def read_center(address: str, size: tuple[int, int] | None, downscale: int, is_grey: bool) -> tuple[np.ndarray, str]:
    """Read the image that fills the center of the samples.

    Args:
        address: an image file.
        size: (height, width) of the samples, in pixels.
        downscale: image pixels per latent pixel along one side; 1 for models of pixels.
        is_grey: whether the model has one channel.

    Returns:
        The image as (C, H, W) uint8, and the sha256 of its file.

    Raises:
        UserError: the image cannot be read, or it does not fit.
    """
    if size is None:
        raise UserError(f"--outpaint {address} needs a larger canvas: give its --size HxW")
    image, sha256 = _read_image(address, is_grey)
    height, width = image.shape[1:]
    for inner, outer in ((height, size[0]), (width, size[1])):
        if inner > outer or (outer - inner) % (2 * downscale) or inner % downscale:
            raise UserError(
                f"--outpaint {address}: {height}x{width} pixels do not fit into the center of {size[0]}x{size[1]}; "
                f"the image and its margins must be multiples of {downscale} pixels"
            )
    return image, sha256


def _read_image(address: str, is_grey: bool) -> tuple[np.ndarray, str]:
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"--outpaint {address}: there is no such file")
    content = folder.read(name)
    try:
        pixels = np.asarray(decode(content, 1 if is_grey else 3))
    except Exception as error:  # Pillow raises many types
        raise UserError(f"--outpaint {address} cannot be read as an image ({error})") from None
    return pixels[None] if is_grey else pixels.transpose(2, 0, 1), hashlib.sha256(content).hexdigest()
