"""Windows: a canvas of any size, denoised in overlapping windows of the trained size (MultiDiffusion)."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

Network = Callable[..., Tensor]


class WindowedNetwork:
    """A network that sees a canvas in overlapping windows, and blends its estimates.

    Every window is a full image to the network. The blended estimate is the one that is nearest to the estimates of
    all windows, weighted by how near a pixel is to the middle of the window (MultiDiffusion: Bar-Tal et al. 2023,
    Eq. 5). Windows overlap by at least half of their side, so that no border is seen by one window alone.

    Args:
        network: network(x, sigma, coordinates, labels, condition) -> clean estimate, such as a `Denoiser`.
        side: height and width of a window, in values of the network.
    """

    def __init__(self, network: Network, side: int) -> None:
        self.network, self.side = network, side

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        coordinates: None = None,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """The estimate of a canvas, (B, C, H, W), from one evaluation of the network per window.

        Args:
            x: (B, C, H, W), not smaller than a window.
            sigma: the noise level.
            coordinates: always None: each window has the coordinates of a full image.
            labels: one-hot (B, K), or None.
            condition: (B, K, H, W), or None.
        """
        ramp = (torch.arange(self.side, device=x.device) + 0.5) / self.side
        ramp = torch.minimum(ramp, 1 - ramp)
        weight = ramp[:, None] * ramp
        height, width = x.shape[2:]
        total, weights = x.new_zeros((), dtype=torch.float32), x.new_zeros((), dtype=torch.float32)
        for top, left in product(window_starts(height, self.side), window_starts(width, self.side)):
            window = (..., slice(top, top + self.side), slice(left, left + self.side))
            further = () if condition is None else (condition[window],)
            estimate = self.network(x[window], sigma, None, labels, *further)
            around = (left, width - left - self.side, top, height - top - self.side)
            total, weights = total + pad(weight * estimate, around), weights + pad(weight, around)
        return total / weights


def window_starts(size: int, side: int) -> Sequence[int]:
    """Where windows of a side begin, evenly spaced and overlapping by half of their side or more."""
    count = 1 + -(-2 * (size - side) // side)
    return [round(number * (size - side) / max(count - 1, 1)) for number in range(count)]
