"""Data whose ideal denoiser is known in closed form: normal pixels, Gaussian fields and mixtures of normals."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from patchloom.models.denoiser import Denoiser

SPREAD = 0.5  # standard deviation of normal pixels


def ideal(x: Tensor, sigma: Tensor) -> Tensor:
    """The mean of x0 ~ N(0, SPREAD^2) given x = x0 + sigma * noise."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def marginal(sigma: Tensor | float) -> float:
    """The variance of N(0, SPREAD^2) data with noise of this level."""
    return SPREAD**2 + float(sigma) ** 2


@dataclass(frozen=True)
class GaussianField:
    """Normal images of one channel, or patches of them.

    Args:
        mean: (d,) float64, the pixels row by row.
        covariance: (d, d) float64.
    """

    mean: Tensor
    covariance: Tensor

    @property
    def side(self) -> int:
        return math.isqrt(len(self.mean))

    def draw(self, count: int, seed: int) -> Tensor:
        """(count, 1, side, side) float32."""
        normal = torch.randn(count, len(self.mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pixels = self.mean + normal @ torch.linalg.cholesky(self.covariance).T
        return pixels.view(count, 1, self.side, self.side).float()

    def patch(self, left: int, top: int, size: int) -> "GaussianField":
        """The marginal N(P mu, P Sigma P^T) of the pixels of a patch (Patch Diffusion, Appendix, before Eq. 9)."""
        pixels = torch.arange(len(self.mean)).view(self.side, self.side)[top : top + size, left : left + size].flatten()
        return GaussianField(self.mean[pixels], self.covariance[pixels][:, pixels])

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues and eigenvectors of the covariance."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    def denoise(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The mean of the clean pixels: (B, d) noisy ones and (B,) noise levels -> (B, d)."""
        values, vectors = self.axes
        return self.mean + (noisy - self.mean) @ vectors * (values / (values + sigma[:, None] ** 2)) @ vectors.T

    def error_variances(self, sigma: Tensor) -> Tensor:
        """The eigenvalues of the covariance K - K (K + sigma^2)^-1 K of the error: (B,) noise levels -> (B, d)."""
        values, spread = self.axes[0], sigma[:, None] ** 2
        return values * spread / (values + spread)

    def whiten(self, rows: Tensor, sigma: float) -> Tensor:
        """(n, d) pixels with noise of this level -> independent standard normals, of the same shape."""
        values, vectors = self.axes
        return (rows - self.mean) @ vectors / (values + sigma**2).sqrt()


@dataclass(frozen=True)
class NormalMixture:
    """A mixture of K normals in d dimensions, float64.

    Args:
        weights: (K,), with the sum 1.
        means: (K, d).
        covariances: (K, d, d).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues (K, d) and eigenvectors (K, d, d) of the covariances."""
        values, vectors = torch.linalg.eigh(self.covariances)
        return values, vectors

    @cached_property
    def moments(self) -> GaussianField:
        """The mean and the covariance of the mixture."""
        mean = self.weights @ self.means
        apart = self.means - mean
        covariances = self.covariances + apart[:, :, None] * apart[:, None, :]
        return GaussianField(mean, (self.weights[:, None, None] * covariances).sum(0))

    def chosen(self, components: Tensor) -> "NormalMixture":
        """The mixture of some components, given by (K,) booleans."""
        weights = self.weights[components]
        return NormalMixture(weights / weights.sum(), self.means[components], self.covariances[components])

    def log_shares(self, noisy: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log of weight x density of each component (B, K), up to a constant.

        Also, along the axes of the components, the noisy points and their variances (B, K, d).
        """
        values, vectors = self.axes
        local = torch.einsum("bkd,kde->bke", noisy[:, None] - self.means, vectors)
        total = values + sigma[:, None, None] ** 2
        return self.weights.log() - (local**2 / total + total.log()).sum(2) / 2, local, total

    def denoise(self, noisy: Tensor, sigma: Tensor, allowed: Tensor | None = None) -> Tensor:
        """The mean of the clean points: (B, d) noisy ones and (B,) noise levels -> (B, d).

        `allowed` (B, K) are booleans: the components that a point can have been drawn from.
        """
        values, vectors = self.axes
        shares, local, total = self.log_shares(noisy, sigma)
        if allowed is not None:
            shares = shares.masked_fill(~allowed, -math.inf)
        clean = self.means + torch.einsum("bke,kde->bkd", values / total * local, vectors)
        return torch.einsum("bk,bkd->bd", shares.softmax(1), clean)

    def cdf(self, direction: Tensor, values: np.ndarray) -> np.ndarray:
        """The distribution function of the points along a direction (d,), at (n,) values."""
        spread = torch.einsum("d,kde,e->k", direction, self.covariances, direction).sqrt()
        found: np.ndarray = stats.norm.cdf(values[:, None], self.means @ direction, spread) @ self.weights.numpy()
        return found


def at_all_positions(field: GaussianField, size: int) -> NormalMixture:
    """The patches of a size, where all positions are equally likely."""
    places = range(field.side - size + 1)
    patches = [field.patch(left, top, size) for top in places for left in places]
    weights = torch.full((len(patches),), 1 / len(patches), dtype=torch.float64)
    means, covariances = ([getattr(patch, name) for patch in patches] for name in ("mean", "covariance"))
    return NormalMixture(weights, torch.stack(means), torch.stack(covariances))


ExactDenoise = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExactNetwork(nn.Module):
    """The network that makes a `Denoiser` exact: F = (D - c_skip x) / c_out (EDM, Eq. 7), of one image channel.

    Args:
        denoise: ((B, d) noisy pixels, (B,) sigma, (B, 2 or 0, s, s) coordinates) -> (B, d) clean pixels, in float64.
        sigma_data: that of the denoiser.
    """

    def __init__(self, denoise: ExactDenoise, sigma_data: float) -> None:
        super().__init__()
        self.denoise, self.sigma_data = denoise, sigma_data

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        sigma = (4 * c_noise.double()).exp()
        total = (sigma**2 + self.sigma_data**2).sqrt()[:, None]
        noisy = x[:, 0].flatten(1).double() * total  # c_in is 1 / total
        clean = self.denoise(noisy, sigma, x[:, 1:])
        output = (clean - (self.sigma_data / total) ** 2 * noisy) * total / (sigma[:, None] * self.sigma_data)
        return output.view_as(x[:, :1]).float()


def exact_denoiser(denoise: ExactDenoise, resolution: int, coordinates: str = "linear") -> Denoiser:
    """A denoiser of one channel whose estimate is that of a function."""
    network = ExactNetwork(denoise, SPREAD)
    return Denoiser(network, channels=1, resolution=resolution, coordinates=coordinates, sigma_data=SPREAD)


def corners_of(coordinates: Tensor, resolution: int) -> Tensor:
    """The upper-left corners (B, 2), x first, of patches with these coordinates (B, 2, s, s)."""
    return ((coordinates[:, :, 0, 0] + 1) / 2 * (resolution - 1)).round().long()


def by_position(field: GaussianField, coordinates: Tensor) -> Iterator[tuple[GaussianField, Tensor]]:
    """The patches of the field at the positions in coordinates (B, 2, s, s), each with the numbers of its rows."""
    places, which = corners_of(coordinates, field.side).unique(dim=0, return_inverse=True)
    for number, (left, top) in enumerate(places.tolist()):
        yield field.patch(left, top, coordinates.shape[-1]), (which == number).nonzero().flatten()


def knowing_position(field: GaussianField) -> ExactDenoise:
    """The ideal denoiser of patches that reads their position from their coordinates."""

    def denoise(noisy: Tensor, sigma: Tensor, coordinates: Tensor) -> Tensor:
        clean = torch.empty_like(noisy)
        for patch, rows in by_position(field, coordinates):
            clean[rows] = patch.denoise(noisy[rows], sigma[rows])
        return clean

    return denoise
