"""Features: rows of numbers that describe images, for the metrics. Each kind of network is a class."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from patchloom.errors import CheckpointError
from patchloom.models.cards import FeaturesCard
from patchloom.models.inception import RESIZE, inception_state, load_inception
from patchloom.models.metrics import COLOUR_LAYOUT, colour_layout

INCEPTION, CLASSIFIER = "inception-2015-12-05", "fc.weight"
POOL, SPATIAL = "pool", "spatial"  # one row per image; the features of sFID
DINO_SIDE, DINO_MEAN, DINO_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # Oquab et al. 2023


class Features(ABC):
    """The interface of a feature network. Subclass it to use your own.

    Attributes:
        name: name of the network, for results.
        sha256: sha256 of the weights that the features depend on.
        resize: how images are resized for the network.
        outputs: names of its features.
        classifier: (K, d) or None; the class logits are `pool @ classifier.T`.
    """

    name: str
    sha256: str
    resize: str
    outputs: tuple[str, ...] = (POOL,)
    classifier: Tensor | None = None

    @abstractmethod
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 images -> (N, d) float features by the names of `outputs`."""

    def describe(self) -> FeaturesCard:
        """The part of a result that says which network its features come from."""
        return FeaturesCard(name=self.name, sha256=self.sha256, resize=self.resize)


class ColourFeatures(Features):
    """Mean colours of 4 x 4 tiles, without a network. Their distance is not FID."""

    name, sha256, resize = COLOUR_LAYOUT, "no weights", "none"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 -> `pool` (N, 48)."""
        return {POOL: colour_layout(images)}


class InceptionFeatures(Features):
    """The Inception of FID, sFID, KID and the Inception Score."""

    name, resize, outputs = INCEPTION, RESIZE, (POOL, SPATIAL)

    def __init__(self, state: Mapping[str, Tensor], classifier: Tensor | None, device: torch.device | str) -> None:
        self.state, self.sha256 = state, tensors_sha256(state)
        self.network = load_inception(state, device)
        self.classifier = classifier

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 -> `pool` (N, 2048) and `spatial` (N, 2023)."""
        features = self.network(images)
        return {name: features[name] for name in self.outputs}


class TorchScriptFeatures(Features):
    """A TorchScript module that maps (N, 3, H, W) uint8 images of any size to (N, d) features."""

    def __init__(self, path: Path, device: torch.device | str) -> None:
        self.network = torch.jit.load(path, map_location=device).eval()
        self.name, self.resize = path.stem, "the module's own"
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 -> `pool` (N, d).

        Raises:
            CheckpointError: the module refuses the images, or does not return (N, d).
        """
        try:
            found = self.network(images)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise CheckpointError(
                f"{self.name} does not accept (N, 3, H, W) uint8 images ({reason}): wrap it in a module that does"
            ) from None
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise CheckpointError(
                f"{self.name} returns {shape} instead of one row of features per image: wrap it in a module that does"
            )
        return {POOL: found.float()}


class DinoFeatures(Features):
    """DINOv2's class token (Oquab et al. 2023), from a folder of Hugging Face's transformers."""

    resize = f"bicubic with antialiasing to {DINO_SIDE}"

    def __init__(self, folder: Path, name: str, device: torch.device | str) -> None:
        from transformers import Dinov2Model
        from transformers.utils import logging

        logging.disable_progress_bar()  # Patchloom shows its own
        self.network = Dinov2Model.from_pretrained(folder, use_safetensors=True).eval().to(device)
        self.name, self.sha256 = name, tensors_sha256(self.network.state_dict())

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) uint8 -> `pool` (N, d)."""
        x = F.interpolate(images.float() / 255, (DINO_SIDE, DINO_SIDE), mode="bicubic", antialias=True)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (DINO_MEAN, DINO_STD))
        return {POOL: self.network((x.clamp(0, 1) - mean) / std).pooler_output}


def features_of_file(path: Path, device: torch.device | str = "cpu") -> Features:
    """Load features from a file. Pickles are read as plain tensors only.

    Args:
        path: weights of Inception (.safetensors, .pth or TorchScript), or another TorchScript module.
        device: device of the network.

    Raises:
        CheckpointError: the file is none of these.
    """
    scripted = None
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            try:
                scripted = torch.jit.load(path, map_location="cpu")
                tensors = scripted.state_dict()
            except RuntimeError:
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        state, classifier = inception_state(tensors)
    except ValueError as error:
        if scripted is not None:
            return TorchScriptFeatures(path, device)
        raise CheckpointError(f"{path}: {error}; give the weights of Inception or a TorchScript file") from None
    except (SafetensorError, RuntimeError, OSError, EOFError, TypeError, AttributeError) as error:
        problem = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} has no features ({problem[:120]}): give the weights of Inception or a TorchScript file"
        ) from None
    except Exception as error:  # pickle.UnpicklingError of what is not plain tensors
        if type(error).__name__ != "UnpicklingError":
            raise
        raise CheckpointError(
            f"{path} is a pickle of more than tensors, which can run any code: convert it to safetensors or TorchScript"
        ) from None
    return InceptionFeatures(state, classifier, device)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of the names and values (any shape) of tensors, in their order, for any file format."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
