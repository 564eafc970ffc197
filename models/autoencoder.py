"""Autoencoders: images to the moments of their latents and back, on top of diffusers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.models.errors import CheckpointError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

AUTOENCODER_FORMAT = 1
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' own name


@dataclass
class Autoencoder:
    """A variational autoencoder with what is needed to use it: its downscale, channels, scale and weights' hash."""

    network: AutoencoderKL
    weights_sha256: str

    @property
    def downscale(self) -> int:
        """Image pixels per latent pixel, along one side."""
        return int(2 ** (len(self.network.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.network.config.latent_channels)

    @property
    def scale(self) -> float:
        """The factor that brings a latent to about unit variance, from the autoencoder's own config."""
        return float(self.network.config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 -> mean and std (B, C, H/f, W/f) float32 of the latents' Gaussian posterior."""
        posterior = self.network.encode(images.float() / 127.5 - 1).latent_dist
        return posterior.mean, posterior.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents as `encode` gives them -> (B, 3, H, W) uint8."""
        images: Tensor = self.network.decode(latents.float()).sample
        return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    def describe(self) -> dict[str, Any]:
        """What a dataset's card and `model.json` say of it."""
        return {
            "class": "AutoencoderKL",
            "weights_sha256": self.weights_sha256,
            "downscale": self.downscale,
            "latent_channels": self.latent_channels,
            "input_range": [-1, 1],
            "scale": self.scale,
        }


def new_autoencoder(widths: tuple[int, ...], latent_channels: int, norm_groups: int = 8) -> AutoencoderKL:
    """A diffusers AutoencoderKL with random weights that halves the image len(widths) - 1 times."""
    from diffusers import AutoencoderKL

    network: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=norm_groups,
        mid_block_add_attention=False,  # keeps it convolutional: any image size, and cheap
    )
    return network


def autoencoder_loss(network: AutoencoderKL, images: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
    """Reconstruction (mean absolute error) plus KL to the unit Gaussian (Kingma & Welling 2014), a scalar.

    images: (B, 3, H, W) in [-1, 1].
    """
    posterior = network.encode(images).latent_dist
    decoded = network.decode(posterior.sample(generator)).sample
    loss: Tensor = F.l1_loss(decoded, images) + kl_weight * posterior.kl().mean() / posterior.mean[0].numel()
    return loss


def save_autoencoder(network: AutoencoderKL, folder: Path) -> str:
    """Write diffusers' own folder (safetensors + config) and a card; returns the weights' sha256."""
    network.save_pretrained(folder, safe_serialization=True)
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    card = {"format_version": AUTOENCODER_FORMAT, "kind": "autoencoder", **Autoencoder(network, sha256).describe()}
    (folder / "model.json").write_text(json.dumps(card, indent=2) + "\n")
    return sha256


def load_autoencoder(folder: Path | str, device: torch.device | str = "cpu") -> Autoencoder:
    """Read a folder of diffusers (safetensors only, no pickle); raises CheckpointError where it is not whole."""
    from diffusers import AutoencoderKL

    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}: give the folder of a diffusers AutoencoderKL")
    sha256 = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    card = folder / "model.json"
    if card.is_file():
        described = json.loads(card.read_text())
        if described["format_version"] > AUTOENCODER_FORMAT:
            raise CheckpointError(
                f"{card} has format {described['format_version']} and this version reads up to {AUTOENCODER_FORMAT}: "
                "update patchloom"
            )
        wanted = described["weights_sha256"]
        if wanted != sha256:
            raise CheckpointError(
                f"{folder / WEIGHTS} has sha256 {sha256[:12]} and its card says {wanted[:12]}: fetch it again"
            )
    network = AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    return Autoencoder(network.eval().requires_grad_(False).to(device), sha256)
