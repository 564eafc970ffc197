"""The denoiser: a network preconditioned so that it learns equally well at every noise level."""

from typing import Any

import torch
from torch import Tensor, nn

from patchloom.models.patches import coordinate_grid
from patchloom.models.unet import NETWORKS

COORDINATE_CHANNELS = 2


class Denoiser(nn.Module):
    """D(x; sigma), the clean estimate of a noisy image or patch (EDM, Eq. 7; Patch Diffusion, Eq. 4).

    The patch's coordinates are joined here, as channels beside the image; they are not scaled by c_in.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: int,
        resolution: int,
        classes: int = 0,
        coordinates: bool = True,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.model = network
        self.channels, self.resolution, self.classes = channels, resolution, classes
        self.coordinates, self.sigma_data = coordinates, sigma_data

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor | float,
        coordinates: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W) noisy images at noise level `sigma` -> their clean estimate, float32.

        sigma: (B,) or scalar, in units of the data. coordinates: (B, 2, H, W), x first, or None for the
        full grid of the input's own size. labels: one-hot (B, K), or None for the zero vector (no class).
        Raises ValueError for coordinates or labels that the network has no channels for.
        """
        noisy = noisy.to(torch.float32)
        batch, _, height, width = noisy.shape
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=noisy.device).expand(batch)
        spread = sigma[:, None, None, None]
        total = (spread**2 + self.sigma_data**2).sqrt()
        c_skip = (self.sigma_data / total) ** 2
        c_out = spread * self.sigma_data / total
        c_in = 1 / total
        c_noise = sigma.log() / 4

        x = c_in * noisy
        if self.coordinates:
            if coordinates is None:
                coordinates = coordinate_grid(height, width, noisy.device)[None].expand(batch, -1, -1, -1)
            x = torch.cat([x, coordinates.to(torch.float32)], dim=1)
        elif coordinates is not None:
            raise ValueError("coordinates were given to a network without coordinate channels")
        estimate: Tensor = self.model(x, c_noise, self._labels(labels, batch, noisy.device))
        return c_skip * noisy + c_out * estimate.to(torch.float32)

    def _labels(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        if not self.classes:
            if labels is not None:
                raise ValueError("labels were given to a network without classes")
            return None
        if labels is None:
            return torch.zeros(batch, self.classes, device=device)
        return labels.to(torch.float32)


def build_denoiser(config: dict[str, Any]) -> Denoiser:
    """A denoiser with freshly drawn weights from its description in `model.json`.

    config: `network` ("song" or "dhariwal"), `network_options` (its constructor's arguments),
    `resolution`, `channels`, `classes`, `coordinates`, `sigma_data`.
    """
    if config["network"] not in NETWORKS:
        known = ", ".join(sorted(NETWORKS))
        raise ValueError(f"network {config['network']!r} is unknown: choose one of {known}")
    network = NETWORKS[config["network"]](
        resolution=config["resolution"],
        channels_in=config["channels"] + (COORDINATE_CHANNELS if config["coordinates"] else 0),
        channels_out=config["channels"],
        classes=config["classes"],
        **config["network_options"],
    )
    return Denoiser(
        network,
        channels=config["channels"],
        resolution=config["resolution"],
        classes=config["classes"],
        coordinates=config["coordinates"],
        sigma_data=config["sigma_data"],
    )
