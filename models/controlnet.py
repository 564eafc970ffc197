"""ControlNets: a trainable copy of the encoder of a frozen diffusion UNet, which it controls by an image."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from patchloom.models.conditions import depth_to_space
from patchloom.models.manifest import sha256_of_file

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

BASE_FOLDER = "PATCHLOOM_BASE_MODEL"  # an environment variable: where this machine has the base of a model
UNET_WEIGHTS, UNET_CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
CONTROL_WIDTHS = (16, 32, 96, 256)  # of the embedding of the control image, which is halved between two of them
SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
PREDICTIONS = ("epsilon", "v_prediction")
MOST_CONFIG_VALUE, MOST_CONFIG_VALUES, MOST_LAYERS = 1 << 14, 64, 64


class FrozenNetwork:
    """Holds a network outside of the module that uses it: copies share it, and it is neither trained nor saved."""

    def __init__(self, network: Any) -> None:
        self.network = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: object) -> FrozenNetwork:
        return self


class ControlNetwork(nn.Module):
    """A frozen UNet of diffusers with a trainable ControlNet (Zhang et al. 2023), called as `network(x, time, text)`.

    The channels of x are those of the latent, the coordinates and the condition image.

    Args:
        resolution: side of a full latent.
        channels_in: channels of x.
        channels_out: channels of the latent.
        classes: must be 0; the base has none.
        base: hub id or folder of the model in the format of diffusers.
        base_sha256: sha256 of the weights of its UNet.
        unet: the configuration of its UNet.
        schedule: its noise levels: the keys of `SCHEDULE_KEYS`.
        control_channels: channels of the control image, without coordinates.
        downscale: pixels of the control image per latent pixel, along one side.
        tokens: tokens of a text embedding.

    Raises:
        ValueError: the base is missing or has other weights, or something does not fit.
    """

    def __init__(
        self,
        *,
        resolution: int,
        channels_in: int,
        channels_out: int,
        classes: int,
        base: str,
        base_sha256: str,
        unet: Mapping[str, Any],
        schedule: Mapping[str, Any],
        control_channels: int,
        downscale: int,
        tokens: int,
    ) -> None:
        super().__init__()
        from diffusers import ControlNetModel

        _check_unet(unet, channels_out, classes, base)
        _check_config(schedule)
        network = _frozen_unet(base, base_sha256, unet)
        self._frozen = FrozenNetwork(network)
        self.channels, self.downscale, self.prediction = channels_out, downscale, str(schedule["prediction_type"])
        self.condition_channels = control_channels * downscale**2
        self.text_shape = (tokens, int(unet["cross_attention_dim"]))
        self.halvings = len(network.config.block_out_channels) - 1
        coordinates = channels_in - channels_out - self.condition_channels
        self.controlnet: ControlNetModel = ControlNetModel.from_unet(
            network,
            conditioning_embedding_out_channels=control_widths(downscale),
            conditioning_channels=control_channels + coordinates,
        )
        self.register_buffer("no_text", torch.zeros(self.text_shape))
        self.no_text: Tensor
        self.register_buffer("log_sigmas", schedule_log_sigmas(schedule).to(self.no_text.device), persistent=False)
        self.log_sigmas: Tensor

    @property
    def frozen(self) -> UNet2DConditionModel:
        """The UNet of the base."""
        network: UNet2DConditionModel = self._frozen.network
        return network

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ControlNetwork:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.frozen._apply(fn)
        return self

    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out, c_in and c_noise of the base for noise levels (EDM, Table 1: VP).

        For noise, D = x - sigma * eps; for v, D = c_in^2 x - sigma c_in v, with c_in = 1 / sqrt(1 + sigma^2).

        Args:
            sigma: (B,) noise levels.

        Returns:
            Three factors, (B, 1, 1, 1), and the time steps, (B,).
        """
        spread = sigma[:, None, None, None]
        c_in = 1 / (1 + spread**2).sqrt()
        if self.prediction == "epsilon":
            return torch.ones_like(spread), -spread, c_in, self.time_steps(sigma)
        return c_in**2, -spread * c_in, c_in, self.time_steps(sigma)

    def time_steps(self, sigma: Tensor) -> Tensor:
        """The time steps t(sigma) of the base, (B,) floats: between two of them by interpolation of ln(sigma)."""
        levels, logs = self.log_sigmas, sigma.log()
        above = torch.searchsorted(levels, logs).clamp(1, len(levels) - 1)
        share = (logs - levels[above - 1]) / (levels[above] - levels[above - 1])
        return above - 1 + share.clamp(0, 1)

    def training_levels(self, normals: Tensor) -> Tensor:
        """Noise levels of time steps that are uniform (DDPM), from standard normals of shape (B,)."""
        steps = (torch.special.ndtr(normals) * len(self.log_sigmas)).long().clamp(0, len(self.log_sigmas) - 1)
        return self.log_sigmas[steps].exp()

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the base knows."""
        low, high = self.log_sigmas[[0, -1]].exp().tolist()
        return float(low), float(high)

    def loss_weight(self, sigma: Tensor) -> Tensor:
        """The weight of the error of D that makes it the error of the noise, or of v; (B,) noise levels."""
        return sigma**-2 if self.prediction == "epsilon" else 1 + sigma**-2

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Predict the noise, or v.

        Args:
            x: (B, C + coordinates + condition, h, w), the latent scaled by c_in and the other channels as they are.
            time: (B,) time steps.
            text: (B, tokens, width) embeddings; zeros for no text.

        Returns:
            (B, C, h, w).
        """
        noisy, condition = x[:, : self.channels], x[:, x.shape[1] - self.condition_channels :]
        text = torch.where(text.flatten(1).any(1)[:, None, None], text, self.no_text)
        down, middle = self.controlnet(noisy, time, text, self.control_image(x), return_dict=False)
        is_shown = condition.flatten(1).any(1)[:, None, None, None].to(x.dtype)  # no condition: the base alone
        prediction: Tensor = self.frozen(
            noisy,
            time,
            text,
            down_block_additional_residuals=tuple(residual * is_shown for residual in down),
            mid_block_additional_residual=middle * is_shown,
            return_dict=False,
        )[0]
        return prediction

    def control_image(self, x: Tensor) -> Tensor:
        """The control image of the ControlNet.

        Args:
            x: as for `forward`.

        Returns:
            (B, K + coordinates, h * f, w * f): the condition in [0, 1], then the coordinates of the latent pixels.
        """
        first = x.shape[1] - self.condition_channels
        image = depth_to_space(x[:, first:], self.downscale) / 2 + 0.5
        places = x[:, self.channels : first]
        places = places.repeat_interleave(self.downscale, dim=2).repeat_interleave(self.downscale, dim=3)
        return torch.cat([image, places], dim=1)


def control_widths(downscale: int) -> tuple[int, ...]:
    """The widths of the embedding of a control image; raises ValueError if it cannot be reduced by this factor."""
    halvings = downscale.bit_length() - 1
    if downscale != 2**halvings or halvings >= len(CONTROL_WIDTHS):
        raise ValueError(f"a control image is reduced by 1, 2, 4 or 8, and the autoencoder reduces by {downscale}")
    return CONTROL_WIDTHS[: halvings + 1]


def schedule_log_sigmas(schedule: Mapping[str, Any]) -> Tensor:
    """ln(sigma) of every time step, with sigma^2 = (1 - a) / a for the alphas_cumprod a of diffusers.

    Args:
        schedule: the keys of `SCHEDULE_KEYS`.

    Returns:
        (steps,) float32 on the CPU.

    Raises:
        ValueError: the prediction is unknown, or the last time step has no signal.
    """
    from diffusers import DDPMScheduler

    if schedule["prediction_type"] not in PREDICTIONS:
        raise ValueError(
            f"the base predicts {schedule['prediction_type']}, and {' or '.join(PREDICTIONS)} is supported"
        )
    with torch.device("cpu"):
        kept = DDPMScheduler.from_config(dict(schedule)).alphas_cumprod.double()
        logs = ((1 - kept) / kept).log() / 2
    if not logs.isfinite().all():
        raise ValueError("the last time step of the base has no signal (zero terminal SNR), which is not supported")
    levels: Tensor = logs.float()
    return levels


def base_folder(base: str) -> Path:
    """The folder of a base model on this machine: the environment's, `base` itself, or from Hugging Face's hub.

    Raises:
        ValueError: it is missing or incomplete.
    """
    given = os.environ.get(BASE_FOLDER)
    folder = Path(given or base)
    if not folder.is_dir():
        if given or base.startswith((".", "/")):
            raise ValueError(f"the base model {folder} does not exist: set {BASE_FOLDER} to its folder on this machine")
        folder = _from_hub(base)
    for name in (UNET_CONFIG, UNET_WEIGHTS, SCHEDULER_CONFIG):
        if not (folder / name).is_file():
            raise ValueError(
                f"the base model {folder} has no {name}: give a Stable Diffusion in the format of diffusers"
            )
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[UNET_CONFIG, UNET_WEIGHTS, SCHEDULER_CONFIG]))
    except Exception as error:  # errors of requests, of the hub and of the disk
        problem = " ".join(str(error).split())[:160]
        raise ValueError(
            f"the base model {name} is not a folder and cannot be fetched from Hugging Face's hub ({problem}): "
            f"set {BASE_FOLDER} to its folder on this machine"
        ) from None


def describe_base(base: str) -> dict[str, Any]:
    """What a model records about its base: the options `base`, `base_sha256`, `unet` and `schedule` of the network.

    Raises:
        ValueError: the base is missing, or is no Stable Diffusion.
    """
    folder = base_folder(base)
    try:
        unet, scheduler = (json.loads((folder / name).read_bytes()) for name in (UNET_CONFIG, SCHEDULER_CONFIG))
        schedule = {key: scheduler[key] for key in SCHEDULE_KEYS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the base model {folder} has a damaged configuration ({error}): fetch it again") from None
    return {
        "base": base,
        "base_sha256": _weights_digest(str(folder / UNET_WEIGHTS), (folder / UNET_WEIGHTS).stat().st_mtime_ns),
        "unet": {key: value for key, value in unet.items() if not key.startswith("_")},
        "schedule": schedule,
    }


@functools.lru_cache(maxsize=4)
def _weights_digest(path: str, changed_ns: int) -> str:
    """The sha256 of a file of several GB, which is read again only if it was changed."""
    return sha256_of_file(Path(path))


def _check_unet(unet: Mapping[str, Any], channels: int, classes: int, base: str) -> None:
    """Raise ValueError unless this is the UNet of a Stable Diffusion for such latents, with sizes in bounds."""
    if unet.get("in_channels") != channels or unet.get("out_channels") != channels:
        raise ValueError(
            f"the base model {base} has {unet.get('in_channels')} channels, and the latents have {channels}: prepare "
            "the images with the autoencoder of the base"
        )
    if classes or unet.get("addition_embed_type") or unet.get("class_embed_type"):
        raise ValueError(f"the base model {base} has inputs other than text: give a Stable Diffusion 1 or 2")
    if not isinstance(unet.get("cross_attention_dim"), int):
        raise ValueError(f"the base model {base} has no text of one width: give a Stable Diffusion 1 or 2")
    _check_config(unet)


def _check_config(values: Any) -> None:
    """Raise ValueError if a number or a list of a configuration is beyond any network."""
    inner = list(values.values()) if isinstance(values, Mapping) else values
    if isinstance(values, Mapping):
        for key in ("layers_per_block", "transformer_layers_per_block"):
            if np.max(values.get(key) or 1) > MOST_LAYERS:
                raise ValueError(f"a configuration has {key} {values[key]}")
    if isinstance(inner, list | tuple):
        if not isinstance(values, Mapping) and len(inner) > MOST_CONFIG_VALUES:
            raise ValueError(f"a configuration has a list of {len(inner):,} values")
        for value in inner:
            _check_config(value)
    elif isinstance(inner, int | float) and abs(inner) > MOST_CONFIG_VALUE:
        raise ValueError(f"a configuration has the number {inner}")


def _frozen_unet(base: str, sha256: str, config: Mapping[str, Any]) -> UNet2DConditionModel:
    """The UNet of a base with its weights; without them on torch's meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):  # no time for random weights
        network: UNet2DConditionModel = UNet2DConditionModel.from_config(dict(config))
    if torch.get_default_device().type == "meta":
        return network
    path = base_folder(base) / UNET_WEIGHTS
    found = _weights_digest(str(path), path.stat().st_mtime_ns)
    if found != sha256:
        raise ValueError(
            f"the weights {path} have sha256 {found[:12]}, and the model needs {sha256[:12]} of {base}: set "
            f"{BASE_FOLDER} to the folder of that version"
        )
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()}, assign=True)
    return network
