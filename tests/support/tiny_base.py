"""A Stable Diffusion that is small enough for tests: its folder in the format of diffusers, with random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

TOKENS, WIDTH = 5, 8


def save_tiny_base(folder: Path, channels: int = 4, prediction: str = "epsilon", seed: int = 0, **changes: Any) -> Path:
    """Write the UNet and the scheduler of a tiny Stable Diffusion, whose noise levels are those of version 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        options = {
            "sample_size": 8, "in_channels": channels, "out_channels": channels, "cross_attention_dim": WIDTH,
            "block_out_channels": (8, 16), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "attention_head_dim": 2,
            "norm_num_groups": 4,
        }  # fmt: skip
        network = UNet2DConditionModel(**{**options, **changes})
    network.save_pretrained(folder / "unet")
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    scheduler.save_pretrained(folder / "scheduler")
    return folder
