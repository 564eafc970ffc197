"""A network from outside patchloom: diffusers' UNet2DModel behind a ten-line adapter."""

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn


class DiffusersUNet(nn.Module):
    """Takes what `models/backbones.py` promises to give, and labels as diffusers' class embedding."""

    def __init__(self, resolution: int, channels_in: int, channels_out: int, classes: int, **options: Any) -> None:
        super().__init__()
        self.network = UNet2DModel(resolution, channels_in, channels_out, **options)
        self.map_label = nn.Linear(max(classes, 1), options["block_out_channels"][0] * 4)

    def forward(self, x: Tensor, noise_condition: Tensor, labels: Tensor | None) -> Tensor:
        """(B, C, H, W), (B,), (B, K) -> (B, channels_out, H, W)."""
        classes = torch.zeros(len(x), 1) if labels is None else labels
        return self.network(x, 250 * noise_condition, self.map_label(classes)).sample
