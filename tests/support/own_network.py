"""A network from outside patchloom: diffusers' UNet2DModel behind a ten-line adapter."""

# --8<-- [start:diffusers]
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
        # --8<-- [end:diffusers]


class TiedNetwork(nn.Module):
    """Two convolutions with one weight, the statistics of a BatchNorm, and a counter that is not in its state."""

    steps: Tensor

    def __init__(self, resolution: int, channels_in: int, channels_out: int, classes: int, saved: bool = True) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels_in, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.second.weight = self.first.weight
        self.leave = nn.Conv2d(4, channels_out, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.saved = saved

    def forward(self, x: Tensor, noise_condition: Tensor, labels: Tensor | None) -> Tensor:
        """(B, C, H, W), (B,), (B, K) -> (B, channels_out, H, W)."""
        self.steps += self.training
        return self.leave(self.second(self.first(self.norm(self.enter(x))).relu()))

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """With `saved=False`, a state that is no tensor."""
        state = super().state_dict(*arguments, **options)
        if not self.saved:
            state["note"] = "text"
        return state
