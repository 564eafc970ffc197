"""Autoencoders: images to the moments of their latents, and back. Each kind of autoencoder is a class."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from patchloom.errors import CheckpointError
from patchloom.models.backbones import import_allowed
from patchloom.models.cards import AutoencoderCard
from patchloom.models.manifest import MANIFEST_FILE, check_manifest, check_regular, write_manifest
from patchloom.pickles import is_pickle

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

AUTOENCODER_FORMAT = 1
CARD_FILE, CONFIG = "model.json", "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' own name
NORM_GROUPS = 8  # of the group normalisation of new autoencoders: their widths are multiples of it
DIFFUSERS_KINDS = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderDC")


class Autoencoder(ABC):
    """The interface of an autoencoder. Subclass it to use your own.

    The `model.json` in its folder names the class: `{"format_version": 1, "kind": "autoencoder", "class":
    "package.module:Class"}`. The weights are safetensors in the same folder.
    `--allow-backbone package` allows its import.
    """

    downscale: int  # image pixels per latent pixel, along one side
    latent_channels: int
    scale: float = 1.0  # latents enter a network as (latent - shift) * scale, unless they are whitened
    shift: float = 0.0
    latents_mean: tuple[float, ...] | None = None  # per channel; replaces `shift`
    latents_std: tuple[float, ...] | None = None  # per channel; divides `scale`
    weights_sha256: str = ""  # set by `load_autoencoder`

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Autoencoder:
        """Load it from its folder.

        Args:
            folder: the folder, with safetensors and `model.json`.
            device: device of the weights.
            dtype: precision of the computation.
        """

    @abstractmethod
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode images to the Gaussian posterior of their latents.

        Args:
            images: (B, 3, H, W) uint8.

        Returns:
            Mean and std, (B, C, H / downscale, W / downscale) float32; std is None for a deterministic autoencoder.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents as `encode` gives them -> (B, 3, H, W) uint8."""

    @property
    def kind(self) -> str:
        """The name of the class in cards."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    def describe(self) -> AutoencoderCard:
        """The entry `autoencoder` of `dataset.json` and `model.json`."""
        return AutoencoderCard(
            class_name=self.kind,
            weights_sha256=self.weights_sha256,
            downscale=self.downscale,
            latent_channels=self.latent_channels,
            scale=self.scale,
            shift=self.shift,
            latents_mean=self.latents_mean,
            latents_std=self.latents_std,
        )


class DiffusersAutoencoder(Autoencoder):
    """An AutoencoderKL, AutoencoderTiny or AutoencoderDC of diffusers. They take pixels in [-1, 1]."""

    def __init__(self, network: Any) -> None:
        config = network.config
        # the widths; the image is halved between two of them
        widths = next(config[name] for name in ("block_out_channels", "encoder_block_out_channels") if name in config)
        self.network = network
        self.downscale = int(2 ** (len(widths) - 1))
        self.latent_channels = int(config.latent_channels)
        self.scale = float(config.get("scaling_factor") or 1.0)
        self.shift = float(config.get("shift_factor") or 0.0)
        self.latents_mean = _floats(config.get("latents_mean"), self.latent_channels)
        self.latents_std = _floats(config.get("latents_std"), self.latent_channels)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str, dtype: torch.dtype) -> DiffusersAutoencoder:
        """Load a folder in the format of diffusers, from safetensors only."""
        network = _diffusers_class(folder).from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=dtype
        )
        return cls(network.eval().requires_grad_(False).to(device))

    @property
    def kind(self) -> str:
        """diffusers' name of the class."""
        return type(self.network).__name__

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) uint8 -> mean and std of the posterior, (B, C, H/f, W/f) float32; std is None without one."""
        found = self.network.encode((images.float() / 127.5 - 1).to(self.network.dtype))
        if "latent_dist" in found:
            return found.latent_dist.mean.float(), found.latent_dist.std.float()
        latents: Tensor = found.latents if "latents" in found else found.latent
        return latents.float(), None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents -> (B, 3, H, W) uint8 images; raises ValueError if half precision overflows."""
        images: Tensor = self.network.decode(latents.to(self.network.dtype)).sample
        if images.dtype != torch.float32 and not images.is_meta and not images.isfinite().all():
            raise ValueError(f"precision: the decoded images are not finite in {images.dtype}; use fp32")
        return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def _diffusers_class(folder: Path) -> Any:
    """The class of an autoencoder in the format of diffusers: one of ours, whatever else its files name."""
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

    classes = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, AutoencoderDC)}
    name = str(_json_of(folder / CONFIG).get("_class_name"))
    if name not in classes:
        raise CheckpointError(f"{folder / CONFIG} names the class {name}: give one of {', '.join(DIFFUSERS_KINDS)}")
    return classes[name]


def _json_of(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without the file."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object: fetch it again")
    return content


def _floats(values: Any, count: int) -> tuple[float, ...] | None:
    """One number per channel; None where the configuration has none."""
    floats = tuple(float(value) for value in np.ravel(values)) if values is not None else ()
    if floats and len(floats) != count:
        raise CheckpointError(f"{CONFIG}: {len(floats)} statistics of latents for {count} channels: fetch it again")
    return floats or None


def new_autoencoder(widths: tuple[int, ...], latent_channels: int) -> AutoencoderKL:
    """A diffusers AutoencoderKL with random weights that halves the image len(widths) - 1 times."""
    from diffusers import AutoencoderKL

    network: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=NORM_GROUPS,
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
    """Write a folder in the format of diffusers, and `model.json`. Returns the sha256 of the weights."""
    network.save_pretrained(folder, safe_serialization=True)
    sha256 = weights_sha256(folder)
    described = replace(DiffusersAutoencoder(network).describe(), weights_sha256=sha256)
    card = {"format_version": AUTOENCODER_FORMAT, "kind": "autoencoder", **described.to_json()}
    (folder / CARD_FILE).write_text(json.dumps(card, indent=2) + "\n")
    write_manifest(folder)
    return sha256


def copy_autoencoder(folder: Path, target: Path) -> None:
    """Copy the files of an autoencoder into a new folder."""
    for name in autoencoder_files(folder):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def autoencoder_files(folder: Path) -> list[str]:
    """The names of the files that an autoencoder is loaded from; only these are copied.

    Of a folder in the format of diffusers that is its configuration, its card and its weights, which can be links into
    a cache. Your own class may read any file in its folder, but none by a link out of it.

    Raises:
        CheckpointError: the folder of your own class has such a link.
    """
    if ":" in str(_json_of(folder / CARD_FILE).get("class")):
        check_regular(folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return [name for name in names if not is_pickle(folder / name)]
    names = [CONFIG, CARD_FILE, MANIFEST_FILE, *sorted(path.name for path in folder.glob("*.safetensors"))]
    return [name for name in names if (folder / name).is_file()]


def weights_sha256(folder: Path) -> str:
    """The sha256 of all safetensors of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def load_autoencoder(
    folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Load an autoencoder from its folder. Only safetensors are read, no pickles.

    Args:
        folder: a folder in the format of diffusers, or of your own `Autoencoder`.
        device: device of the weights.
        dtype: precision of the computation.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or its class is unknown or not allowed.
    """
    folder = Path(folder)
    card = _json_of(folder / CARD_FILE)
    if card.get("format_version", 0) > AUTOENCODER_FORMAT:
        raise CheckpointError(
            f"{folder / CARD_FILE} has format {card['format_version']}, and this version reads up to "
            f"{AUTOENCODER_FORMAT}: update patchloom"
        )
    config = _json_of(folder / CONFIG)
    name = str(card.get("class") or config.get("_class_name"))
    if ":" not in name and (name not in DIFFUSERS_KINDS or not (folder / WEIGHTS).is_file()):
        what = f"holds a {name}" if name not in (*DIFFUSERS_KINDS, "None") else f"holds no {WEIGHTS} with its {CONFIG}"
        raise CheckpointError(f"{folder} {what}: give the folder of a diffusers {' or '.join(DIFFUSERS_KINDS)}")
    if ":" not in name and config.get("_class_name") != name:
        other = config.get("_class_name")
        raise CheckpointError(
            f"{folder / CONFIG} names the class {other}, and {CARD_FILE} names {name}: fetch it again"
        )
    check_manifest(folder)
    sha256 = weights_sha256(folder)
    if card.get("weights_sha256", sha256) != sha256:
        raise CheckpointError(
            f"{folder}: the weights have sha256 {sha256[:12]} instead of {card['weights_sha256'][:12]}: fetch it again"
        )
    try:
        kind = import_allowed(name) if ":" in name else DiffusersAutoencoder
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    autoencoder: Autoencoder = kind.load(folder, device, dtype)
    autoencoder.weights_sha256 = sha256
    return autoencoder
