"""The denoiser: a network with the preconditioning of EDM (Table 1)."""

import json
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from patchloom.models.backbones import build_backbone
from patchloom.models.cards import CONTROLNET, DenoiserConfig, check_bounds
from patchloom.models.controlnet import ControlNetwork
from patchloom.models.patches import COORDINATE_CHANNELS, coordinate_grid, encode_coordinates
from patchloom.models.unet import UNETS, UNet


class Denoiser(nn.Module):
    """D(x; sigma), the clean estimate of a noisy image or patch (EDM, Eq. 7; Patch Diffusion, Eq. 4).

    The coordinates of the patch and a condition image are further input channels. c_in does not scale them.

    Args:
        network: `network(x, c_noise, labels)`, such as a `UNet`. A `ControlNetwork` has its own preconditioning, and
            embeddings of texts in place of labels.
        channels: channels of the image or latent.
        resolution: side of the full image.
        classes: number of classes; 0 for none.
        coordinates: encoding of the coordinates: "linear", "periodic", "implicit" (linear, with 1x1 convolutions
            first in the network) or "none".
        patch_size: whether the network gets the side of the patch over that of the image.
        condition_channels: channels of the condition; 0 for none.
        sigma_data: standard deviation of the data.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        channels: int,
        resolution: int,
        classes: int = 0,
        coordinates: str = "linear",
        patch_size: bool = False,
        condition_channels: int = 0,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.model = network
        self.channels, self.resolution, self.classes = channels, resolution, classes
        self.coordinates, self.patch_size, self.sigma_data = coordinates, patch_size, sigma_data
        self.condition_channels = condition_channels

    def forward(
        self,
        noisy: Tensor,
        sigma: Tensor | float,
        coordinates: Tensor | None = None,
        labels: Tensor | None = None,
        condition: Tensor | None = None,
        *,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """Estimate the clean images (EDM, Eq. 7).

        Args:
            noisy: (B, C, H, W) of any float dtype.
            sigma: noise levels, (B,) or scalar, in units of the data.
            coordinates: (B, 2, H, W), x first. Default: the full grid of the input's size.
            labels: one-hot (B, K), or text embeddings (B, tokens, width). Default: zeros (no class, no text).
            condition: (B, K, H, W) values of the network, for the same pixels. Default: zeros (no condition).
            augmentation: (B, A) labels of `augment`. Default: unchanged images.

        Returns:
            (B, C, H, W) float32.

        Raises:
            ValueError: the network has no channels for the coordinates, labels or condition, or cannot halve the sides.
        """
        noisy = noisy.to(torch.float32)
        batch = len(noisy)
        if not isinstance(sigma, Tensor) or (sigma.ndim == 0 and sigma.device.type == "cpu"):
            sigma = torch.full((), float(sigma), device=noisy.device)  # a copy from the host would wait for the device
        sigma = sigma.to(noisy.device, torch.float32).expand(batch)
        if isinstance(self.model, ControlNetwork):
            c_skip, c_out, c_in, c_noise = self.model.preconditioning(sigma)
        else:
            c_skip, c_out, c_in, c_noise = self._preconditioning(sigma)

        conditions = self._conditions(noisy, coordinates, augmentation)
        x = self._join_condition(self._join_coordinates(c_in * noisy, coordinates), condition)
        estimate: Tensor = self.model(x, c_noise, self._labels(labels, batch, noisy.device), **conditions)
        return c_skip * noisy + c_out * estimate.to(torch.float32)

    def _preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, (B, 1, 1, 1), and c_noise, (B,), for (B,) noise levels (EDM, Table 1)."""
        spread = sigma[:, None, None, None]
        total = (spread**2 + self.sigma_data**2).sqrt()
        return (self.sigma_data / total) ** 2, spread * self.sigma_data / total, 1 / total, sigma.log() / 4

    def _join_coordinates(self, x: Tensor, coordinates: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        if self.coordinates == "none":
            if coordinates is not None:
                raise ValueError("coordinates: the network has no coordinate channels; leave them out")
            return x
        if coordinates is None:
            coordinates = coordinate_grid(height, width, x.device)[None].expand(batch, -1, -1, -1)
        encoding = "linear" if self.coordinates == "implicit" else self.coordinates
        return torch.cat([x, encode_coordinates(coordinates.to(torch.float32), encoding)], dim=1)

    def _join_condition(self, x: Tensor, condition: Tensor | None) -> Tensor:
        batch, _, height, width = x.shape
        if not self.condition_channels:
            if condition is not None:
                raise ValueError("condition: the network has no channels for a condition; leave it out")
            return x
        shape = (batch, self.condition_channels, height, width)
        if condition is None:
            condition = torch.zeros(shape, device=x.device)
        if condition.shape != shape:
            raise ValueError(f"condition: its shape is {tuple(condition.shape)}, and the network needs {shape}")
        return torch.cat([x, condition.to(torch.float32)], dim=1)

    def _conditions(self, noisy: Tensor, coordinates: Tensor | None, augmentation: Tensor | None) -> dict[str, Tensor]:
        """Further keyword arguments of the network, if any."""
        conditions = {} if augmentation is None else {"augmentation": augmentation}
        if self.patch_size:  # without coordinates, an input of any size is a full image
            is_whole = coordinates is None and self.coordinates != "none"
            fraction = 1.0 if is_whole else min(1.0, max(noisy.shape[2:]) / self.resolution)
            conditions["patch_fraction"] = torch.full((len(noisy),), fraction, device=noisy.device)
        return conditions

    @property
    def text_shape(self) -> tuple[int, int] | None:
        """Tokens and width of the text embeddings that take the place of labels; None for a network without text."""
        return self.model.text_shape if isinstance(self.model, ControlNetwork) else None

    def _labels(self, labels: Tensor | None, batch: int, device: torch.device) -> Tensor | None:
        if self.text_shape is not None:
            return torch.zeros(batch, *self.text_shape, device=device) if labels is None else labels.to(torch.float32)
        if not self.classes:
            if labels is not None:
                raise ValueError("labels: the network has no classes; leave them out")
            return None
        if labels is None:
            return torch.zeros(batch, self.classes, device=device)
        return labels.to(torch.float32)


def build_denoiser(config: DenoiserConfig) -> Denoiser:
    """Build a denoiser with freshly drawn weights.

    Raises:
        ValueError: the network or encoding is unknown, the backbone's package is not allowed, or sizes do not
            fit together.
    """
    if config.coordinates not in COORDINATE_CHANNELS:
        known = ", ".join(COORDINATE_CHANNELS)
        raise ValueError(f"model.coordinates: {config.coordinates!r} is unknown; choose one of {known}")
    return Denoiser(
        _build_network(config),
        channels=config.channels,
        resolution=config.resolution,
        classes=config.classes,
        coordinates=config.coordinates,
        patch_size=bool(config.patch_size),
        condition_channels=config.condition_channels or 0,
        sigma_data=config.sigma_data,
    )


def _build_network(config: DenoiserConfig) -> nn.Module:
    options = {
        "resolution": config.resolution,
        "channels_in": config.channels + COORDINATE_CHANNELS[config.coordinates] + (config.condition_channels or 0),
        "channels_out": config.channels,
        "classes": config.classes,
        **config.network_options,
    }
    if ":" in config.network:
        return build_backbone(config.network, options)
    if config.network == CONTROLNET:
        try:
            return ControlNetwork(**options)
        except (
            TypeError,
            KeyError,
            ArithmeticError,
            RuntimeError,
        ) as error:  # a damaged card, or weights of another UNet
            problem = " ".join(str(error).split())[:200]
            raise ValueError(f"the ControlNet cannot be built ({problem}): check the base model") from None
    if config.network in UNETS:
        try:
            return UNETS[config.network](**options, patch_size=bool(config.patch_size))
        except (TypeError, ArithmeticError, RuntimeError) as error:  # an unknown option, or one of another type
            problem = " ".join(str(error).split())[:200]
            raise ValueError(f"the network {config.network} cannot be built ({problem}): check its options") from None
    known = ", ".join([*sorted(UNETS), CONTROLNET])
    raise ValueError(f"network {config.network!r} is unknown: choose one of {known}, or package.module:Class")


def to_channels_last(denoiser: Denoiser) -> None:
    """Store the weights of a `UNet` with their channels last, so that its activations have this layout too.

    The weights of other networks keep their layout, which their code may need.
    """
    if isinstance(denoiser.model, UNet):
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def skeleton(config: DenoiserConfig) -> Denoiser:
    """A denoiser whose weights have shapes but no memory (torch's `meta` device).

    Raises:
        ValueError: as `build_denoiser`.
    """
    with torch.device("meta"):
        return build_denoiser(config)


def build_checked(config: DenoiserConfig, shapes: Mapping[str, tuple[int, ...]]) -> Denoiser:
    """Build the denoiser of a file from elsewhere, once it is known to need the memory of its weights and no more.

    The numbers of the configuration are bounded first. Then the shapes of a skeleton are compared with those of the
    weights. A backbone from a package that the user allows is built without this comparison.

    Args:
        config: the configuration.
        shapes: the shapes of the stored weights, by name.

    Raises:
        ValueError: as `build_denoiser`, or a number is out of bounds, or the weights are those of another network.
    """
    check_bounds(config)
    if ":" not in config.network:
        expected = {name: tuple(tensor.shape) for name, tensor in skeleton(config).state_dict().items()}
        for name in sorted(expected.keys() | shapes.keys()):
            if expected.get(name) != shapes.get(name):
                wanted, found = (f"the shape {list(known[name])}" if name in known else "nothing"
                                 for known in (expected, shapes))  # fmt: skip
                raise ValueError(f"the network needs {wanted} for {name[:100]}, and the file has {found}")
    return build_denoiser(config)


def halvings_of(config: DenoiserConfig) -> int:
    """How many times the network halves its input: sides must be multiples of 2 to that power.

    Returns:
        The number of halvings; 0 for a backbone from another package, which checks its own input.

    Raises:
        ValueError: as `build_denoiser`.
    """
    if ":" in config.network:  # built each time, because the user may forbid its package again
        skeleton(config)
        return 0
    return _halvings_of_json(json.dumps(config.to_json()))


@cache
def _halvings_of_json(config: str) -> int:
    """Cached, because the plan of a search asks for every trial, and a skeleton takes .05 s, a large one seconds."""
    network = skeleton(DenoiserConfig.from_json(json.loads(config))).model
    assert isinstance(network, UNet | ControlNetwork)
    return network.halvings
