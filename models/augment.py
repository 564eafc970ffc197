"""Augmentation: EDM's geometric transformations of full images, and the labels that describe them to the network."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.models.patches import coordinate_grid

LABELS = 9
SCALE = 2**0.2  # of isotropic and anisotropic scaling, per standard deviation
SHIFT = 1 / 8  # of the image's side, per standard deviation
AUGMENTATION_UNIFORMS, AUGMENTATION_NORMALS = 10, 4  # random numbers per image


def augmentation_parameters(uniforms: Tensor, normals: Tensor, probability: float) -> Tensor:
    """The parameters a0 ... a7 of EDM, Table 6, from random numbers.

    They are flips (2), scale, rotation, anisotropy (2) and translation (2). The horizontal flip is always drawn with
    probability 0.5, as in EDM's runs. The angle of the anisotropy is 0 in half of the cases, as in EDM's pipeline.

    Args:
        uniforms: (B, 10) in [0, 1).
        normals: (B, 4) standard normal.
        probability: probability of each other transformation; otherwise its parameters are 0.

    Returns:
        (B, 8) float32.
    """
    used, coins, turns = uniforms.split([5, 3, 2], dim=1)
    vertical, scaled, rotated, stretched, shifted = (used < probability).float().unbind(1)
    mirrored, flipped, turned = (coins < 0.5).float().unbind(1)
    angle, axis = ((turns * 2 - 1) * math.pi).unbind(1)
    scale, stretch, x, y = normals.unbind(1)
    return torch.stack([
        mirrored,
        flipped * vertical,
        scale * scaled,
        angle * rotated,
        axis * turned * stretched,
        stretch * stretched,
        x * shifted,
        y * shifted,
    ], dim=1)  # fmt: skip


def augmentation_labels(parameters: Tensor) -> Tensor:
    """(B, 8) parameters -> (B, 9) labels of EDM, Table 6; all 0 for an unchanged image."""
    a0, a1, a2, a3, a4, a5, a6, a7 = parameters.unbind(1)
    return torch.stack([a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7], dim=1)


def augment(images: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Transform full images and their coordinates (bicubic; the outside is the reflected image).

    A pixel keeps the coordinates of the place that it comes from, so a crop of a rotated image has the coordinates of
    its content.

    Args:
        images: (B, C, R, R) of any dtype.
        parameters: (B, 8), from `augmentation_parameters`.

    Returns:
        The images (B, C, R, R) float32 and their coordinates (B, 2, R, R).
    """
    matrix = _output_to_input(parameters)
    height, width = images.shape[2:]
    grid = coordinate_grid(height, width, images.device)
    ones = torch.ones_like(grid[:1])
    where = torch.einsum("bij,jhw->bihw", matrix, torch.cat([grid, ones]))
    where = 1 - ((where + 1) % 4 - 2).abs()  # reflection at the borders
    moved = F.grid_sample(
        images.float(), where.permute(0, 2, 3, 1), mode="bicubic", padding_mode="reflection", align_corners=True
    )
    return moved, where


def _output_to_input(parameters: Tensor) -> Tensor:
    """(B, 2, 3) maps from coordinates of the result to those of the image."""
    a0, a1, a2, a3, a4, a5, a6, a7 = parameters.unbind(1)
    forward = (
        _translation(2 * SHIFT * a6, 2 * SHIFT * a7)  # coordinates span 2
        @ _rotation(-a4) @ _scaling(SCALE**a5, SCALE**-a5) @ _rotation(a4)  # the sign of EDM's trained networks
        @ _rotation(-a3)
        @ _scaling(SCALE**a2, SCALE**a2)
        @ _scaling(1 - 2 * a0, 1 - 2 * a1)
    )  # fmt: skip
    inverse: Tensor = torch.linalg.inv_ex(forward).inverse  # `inv` waits for the device to check for singular matrices
    return inverse[:, :2]


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _rotation(angle: Tensor) -> Tensor:
    one, zero, cos, sin = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])
