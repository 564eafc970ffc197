"""In-painting: known values of an image are kept, and the others are sampled to fit (Patch Diffusion, section 4.5)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchloom.models.autoencoder import Autoencoder
from patchloom.models.codec import from_pixels
from patchloom.models.normalisation import Normalisation
from patchloom.models.samplers import Denoise

REPEATS = 4  # of every step, with the method `resample`
KEPT_SOLUTIONS = 2  # of earlier evaluations, with the method `reconstruct`
GRADIENTS = KEPT_SOLUTIONS + 1  # per evaluation
RIDGE = 1e-9  # of the mean diagonal: directions can be parallel, or zero


@dataclass(frozen=True)
class KnownPixels:
    """The known pixels of an image, and how the others are sampled.

    Args:
        image: (C, H, W) uint8, of the size of the samples.
        mask: (H, W) bool, true for the pixels that are kept.
        method: "replace" (`keep_known`), "resample" (`keep_known` and `resampled`) or "reconstruct" (`Reconstruction`).
    """

    image: Tensor
    mask: Tensor
    method: str

    @property
    def repeats(self) -> int:
        """How often a sampler makes each step."""
        return REPEATS if self.method == "resample" else 1

    @property
    def needs_gradients(self) -> bool:
        """Whether estimates need gradients through the denoiser."""
        return self.method == "reconstruct"

    def estimates(
        self,
        denoise: Denoise,
        normalisation: Normalisation,
        autoencoder: Autoencoder | None,
        device: torch.device,
    ) -> Denoise:
        """The denoiser on a device, with estimates in which these pixels are known."""
        values, mask = self.values(normalisation, autoencoder, device)
        return (Reconstruction if self.needs_gradients else keep_known)(denoise, values, mask)

    def values(
        self, normalisation: Normalisation, autoencoder: Autoencoder | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The values of a network that these pixels determine.

        A latent is known if all of its pixels are. The encoder sees the smallest rectangle that contains the known
        pixels, and there their mean colour in place of the others.

        Args:
            normalisation: the model's.
            autoencoder: the encoder; required for latents, ignored for pixels.
            device: where the encoder and the values are.

        Returns:
            (1, C, H, W) float32, zero where nothing is known, and a mask, (1, 1, H, W) bool, at the network's size.

        Raises:
            ValueError: no latent is known.
        """
        if normalisation.kind == "pixels":
            image, mask = (part[None].to(device, non_blocking=True) for part in (self.image, self.mask[None]))
            return from_pixels(image, normalisation, None) * mask, mask
        assert autoencoder is not None
        side = autoencoder.downscale
        mask = -torch.nn.functional.max_pool2d(-self.mask[None, None].float(), side) > 0
        if not mask.any():
            raise ValueError(f"mask: keeps no whole cell of {side}x{side} pixels, which is one latent")
        (top, bottom), (left, right) = _ends(mask[0, 0].any(1)), _ends(mask[0, 0].any(0))
        rows, columns = slice(top * side, bottom * side), slice(left * side, right * side)
        image, known_pixels = self.image[:, rows, columns].float(), self.mask[rows, columns]
        mean = image[:, known_pixels].mean(dim=1)[:, None, None]
        image = torch.where(known_pixels, image, mean).round().to(torch.uint8)
        encoded = from_pixels(image[None].to(device, non_blocking=True), normalisation, autoencoder)
        height, width = mask.shape[2:]
        values = torch.nn.functional.pad(encoded, (left, width - right, top, height - bottom))
        mask = mask.to(device, non_blocking=True)
        return values * mask, mask


def _ends(known: Tensor) -> tuple[int, int]:
    """The first true value, and the one after the last."""
    (places,) = known.nonzero(as_tuple=True)
    return int(places[0]), int(places[-1]) + 1


def keep_known(denoise: Denoise, values: Tensor, mask: Tensor) -> Denoise:
    """Estimates in which the known values replace what the network says of them.

    Every sampler moves the noise there straight to the known values. The network never learns that they are known, so
    the rest fits them only as far as it sees them through the noise.

    Args:
        denoise: the denoiser, as a sampler calls it.
        values: (B or 1, C, H, W) clean values of the network.
        mask: (B or 1, 1, H, W) bool, true where they are known.
    """

    def kept(x: Tensor, sigma: Tensor) -> Tensor:
        estimate = denoise(x, sigma)
        return torch.where(mask, values.to(estimate), estimate)

    return kept


class Reconstruction:
    """Estimates given the known values: the denoiser's estimate, moved until it reconstructs them.

    With D = D(x; sigma), its Jacobian J and the known values y = H x0, sigma^2 J is the covariance of the image x0
    given x (Tweedie's second-order formula). If x0 given x is normal, then

        E[x0 | x, y] = D + J^T H^T v,    H J^T H^T v = y - H D

    (moment matching: Finzi et al. 2023; Boys et al. 2023; Rozet et al. 2024). Each product with J^T is one gradient
    through the denoiser. v is a combination of three directions, v of the last two evaluations and the residual that
    they leave, with the least error |y - H D - H J^T H^T v|. So v improves from step to step, for three gradients per
    evaluation. The least error is sought because J of a trained network is neither symmetric nor positive.

    An object samples one batch: it remembers v.

    Args:
        denoise: the denoiser, as a sampler calls it; it must be differentiable.
        values: (B or 1, C, H, W) clean values of the network.
        mask: (B or 1, 1, H, W) bool, true where they are known.
    """

    def __init__(self, denoise: Denoise, values: Tensor, mask: Tensor) -> None:
        self.denoise, self.values, self.mask = denoise, values, mask
        self._solutions: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The estimate given the known values, (B, C, H, W); these are exact in it."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            graph = self.denoise(x, sigma)

        def moved_by(direction: Tensor) -> Tensor:
            """J^T H^T direction."""
            return torch.autograd.grad(graph, x, direction.to(graph), retain_graph=True)[0]

        estimate, values = graph.detach(), self.values.to(x)
        missing = self.mask * (values - estimate)
        residual, directions, moves = missing, list(self._solutions), [moved_by(one) for one in self._solutions]
        if moves:
            residual = missing - self.mask * self._nearest(moves, moves, missing)
        directions.append(_normed(residual))
        moves.append(moved_by(directions[-1]))
        solution, move = (self._nearest(moves, parts, missing) for parts in (directions, moves))
        self._solutions = [_normed(solution), *self._solutions][:KEPT_SOLUTIONS]
        return torch.where(self.mask, values, estimate + move)

    def _nearest(self, moves: list[Tensor], parts: list[Tensor], missing: Tensor) -> Tensor:
        """The parts, combined with the weights with which the known values of the moves are nearest to the missing."""
        seen = (self.mask[:, None] * torch.stack(moves, 1)).flatten(2)
        products = torch.einsum("bin,bjn->bij", seen, seen)
        ridge = RIDGE * products.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(products.dtype).tiny
        products = products + torch.diag_embed(ridge[:, None].expand(-1, len(moves)))
        wanted = torch.einsum("bin,bn->bi", seen, missing.flatten(1))
        weights: Tensor = torch.linalg.solve_ex(products, wanted).result  # unlike `solve`, it does not wait for a GPU
        return torch.einsum("bk,bkchw->bchw", weights, torch.stack(parts, 1))


def _normed(x: Tensor) -> Tensor:
    """Each image of a batch, scaled to length 1; zero stays zero."""
    length: Tensor = x.flatten(1).norm(dim=1)
    return x / length.clamp(min=torch.finfo(x.dtype).tiny)[:, None, None, None]
