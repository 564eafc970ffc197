"""Known bases: configurations of base models of ControlNets, for counts and costs where their files are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from patchloom.models.controlnet import describe_base

CLIP_LENGTH = 77  # tokens of the texts of Stable Diffusion
VAE_DOWNSCALE = 8  # of Stable Diffusion
SCHEDULE: Mapping[str, Any] = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}  # fmt: skip


@dataclass(frozen=True)
class BaseConfig:
    """A base model and the data that it is made for.

    Args:
        options: `base`, `base_sha256`, `unet` and `schedule` of `ControlNetwork`.
        downscale: pixels of an image per latent pixel, along one side.
        tokens: tokens of a text embedding.
    """

    options: Mapping[str, Any]
    downscale: int = VAE_DOWNSCALE
    tokens: int = CLIP_LENGTH

    @property
    def text(self) -> tuple[int, int]:
        """Tokens and width of a text embedding."""
        return self.tokens, int(self.options["unet"]["cross_attention_dim"])


SD15_UNET: Mapping[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2, "downsample_padding": 1, "mid_block_scale_factor": 1, "act_fn": "silu",
    "norm_num_groups": 32, "norm_eps": 1e-5, "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
# for latents 16 x 16 x 4 of an autoencoder that halves twice; patches of R/4 are halved twice, to 1 x 1
SMALL_UNET: Mapping[str, Any] = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2, "layers_per_block": 1, "norm_num_groups": 8,
    "cross_attention_dim": 32, "attention_head_dim": 4,
}  # fmt: skip
SMALL_TOKENS, SMALL_DOWNSCALE = 4, 4


def _known(base: str, unet: Mapping[str, Any], downscale: int, tokens: int) -> BaseConfig:
    return BaseConfig({"base": base, "base_sha256": "", "unet": unet, "schedule": SCHEDULE}, downscale, tokens)


KNOWN_BASES = {
    known.options["base"]: known
    for known in (
        _known("stable-diffusion-v1-5/stable-diffusion-v1-5", SD15_UNET, VAE_DOWNSCALE, CLIP_LENGTH),
        _known("./small_base", SMALL_UNET, SMALL_DOWNSCALE, SMALL_TOKENS),
    )
}


def planned_base(base: str) -> BaseConfig:
    """The configuration of a base for a plan without data: a known one, or that of its files.

    Args:
        base: hub id or folder.

    Raises:
        ValueError: it is not known, and its files are missing or damaged.
    """
    return KNOWN_BASES.get(base) or BaseConfig(describe_base(base))
