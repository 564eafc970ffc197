"""An autoencoder from outside the package: a tiny real one, pretrained, of 32 latent channels and no posterior."""

import json

# --8<-- [start:imports]
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchloom.models.autoencoder import Autoencoder

# --8<-- [end:imports]

WIDTH, LATENTS = 64, 32


class Block(nn.Module):
    """Three convolutions and a way around them, with a look at the whole image first where there is a `pool`."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        layers = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.pool = (
            nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
            if pooled
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return (self.conv(x) + x).relu()


class SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def half() -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=2, bias=False)


def twice() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]


def blocks(count: int, pooled: bool = False) -> list[nn.Module]:
    return [Block(pooled) for _ in range(count)]


class TinyPretrained(Autoencoder):
    """One class is all that another autoencoder needs."""

    downscale, latent_channels = 8, LATENTS

    def __init__(self, device: torch.device | str, dtype: torch.dtype) -> None:
        first, last = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, LATENTS, 3, padding=1)
        down = [*blocks(1), half(), *blocks(3), half(), *blocks(3), half(), *blocks(3, pooled=True)]
        up = [*blocks(3, pooled=True), *twice(), *blocks(3), *twice(), *blocks(3), *twice(), *blocks(1)]
        self.encoder = nn.Sequential(first, *down, last)
        first, last = nn.Conv2d(LATENTS, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.decoder = nn.Sequential(SoftClamp(), first, nn.ReLU(), *up, last)
        self.device, self.dtype = device, dtype

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> "TinyPretrained":
        made = cls(device, dtype)
        for name, network in (("encoder", made.encoder), ("decoder", made.decoder)):
            network.load_state_dict(load_file(folder / f"{name}.safetensors"))
            network.eval().requires_grad_(False).to(device, dtype)
        return made

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return self.encoder((images.float() / 255).to(self.dtype)).float(), None

    def decode(self, latents: Tensor) -> Tensor:
        images = self.decoder(latents.to(self.dtype)).float()
        return (images.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def save_pretrained(published: Path, folder: Path) -> Path:
    """The published weights as a folder that patchloom opens."""
    folder.mkdir()
    for name in ("encoder", "decoder"):
        weights = torch.load(published / f"taef2_{name}.pth", weights_only=True)
        save_file({key: value.float() for key, value in weights.items()}, folder / f"{name}.safetensors")
    card = {"format_version": 1, "kind": "autoencoder", "class": "own_codec:TinyPretrained"}
    (folder / "model.json").write_text(json.dumps(card))
    return folder


class Fragile(Autoencoder):
    """Averages of 4 x 4 pixels; bright images come out as no number."""

    downscale, latent_channels = 4, 3

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> "Fragile":
        return cls()

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        means = nn.functional.avg_pool2d(images.float(), 4)
        return torch.where(means.mean((1, 2, 3), keepdim=True) > 200, torch.nan, means), None

    def decode(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=4).to(torch.uint8)


# --8<-- [start:blocks]
class Blocks(Autoencoder):
    """The mean of each block of 4 x 4 pixels is a latent pixel."""

    downscale, latent_channels = 4, 3

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> "Blocks":
        return cls()  # a codec with weights reads them from safetensors in this folder

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return nn.functional.avg_pool2d(images.float() / 127.5 - 1, self.downscale), None

    def decode(self, latents: Tensor) -> Tensor:
        pixels = nn.functional.interpolate(latents, scale_factor=self.downscale)
        return (pixels * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
        # --8<-- [end:blocks]
