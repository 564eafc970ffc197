"""Checkpoints: models and training states as safetensors and JSON; nothing is pickled."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from patchloom.errors import CheckpointError
from patchloom.models.autoencoder import Autoencoder, load_autoencoder
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import PowerEMA, PowerProfile
from patchloom.models.normalisation import Normalisation
from patchloom.models.snapshots import load_edm_snapshot, read_edm_snapshot
from patchloom.models.step import TrainingState
from patchloom.models.unet import UNet

__all__ = [
    "CheckpointError",
    "Model",
    "checkpoint_content",
    "is_pickle",
    "load_checkpoint",
    "load_edm_snapshot",
    "load_model",
    "load_whole_model",
    "read_card",
    "read_edm_snapshot",
    "read_profile",
    "save_average",
    "save_checkpoint",
    "save_model",
    "verified_card",
    "write_checkpoint",
]

MODEL_FORMAT = 1
CHECKPOINT_FORMAT = 1
AVERAGE_FORMAT = 1
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt")  # what they are usually called


@dataclass(frozen=True)
class Model:
    """All that sampling needs: the denoiser, its space, the decoder of a latent model, its card."""

    denoiser: Denoiser
    space: Normalisation
    autoencoder: Autoencoder | None
    card: dict[str, Any]


def save_model(folder: Path, denoiser: Denoiser, card: dict[str, Any]) -> None:
    """Write `model.safetensors` and `model.json` into an existing folder; the card last, with the weights' sha256."""
    weights = {name: tensor.contiguous() for name, tensor in denoiser.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    sha256 = file_sha256(folder / "model.safetensors")
    card = {"format_version": MODEL_FORMAT, "kind": "denoiser", **card, "weights_sha256": sha256}
    (folder / "model.json").write_text(json.dumps(card, indent=2) + "\n")


def read_card(folder: Path | str, kind: str) -> dict[str, Any]:
    """The checked `model.json` of a folder that must hold a `kind` ("denoiser" or "autoencoder").

    Raises CheckpointError where it does not, or where a newer version wrote it.
    """
    card = _card_of(Path(folder) / "model.json", MODEL_FORMAT)
    if card.get("kind") != kind:
        raise CheckpointError(f"{folder} is a model of kind {card.get('kind')!r}, and a {kind} was wanted")
    if "weights_sha256" not in card:
        raise CheckpointError(f"{folder}/model.json holds no weights_sha256: fetch the model again")
    return card


def _card_of(path: Path, newest_format: int) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}: give a model folder or models:/NAME@ALIAS")
    try:
        card = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(card, dict) or not isinstance(card.get("format_version"), int):
        raise CheckpointError(f"{path} has no format_version, so it is not patchloom's: fetch it again")
    if card["format_version"] > newest_format:
        raise CheckpointError(
            f"{path} has format {card['format_version']} and this version reads up to {newest_format}: update patchloom"
        )
    return card


def load_model(folder: Path | str) -> Denoiser:
    """The denoiser of a model folder, in eval mode on the CPU; needs torch and safetensors only.

    Raises CheckpointError where the folder is not a model, its weights do not match their checksum, or its
    network is from a package that was not allowed (`backbones.allow_backbones`).
    """
    folder = Path(folder)
    card = verified_card(folder)
    try:
        denoiser = build_denoiser(card["denoiser"])
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    denoiser.load_state_dict(load_file(folder / "model.safetensors"))
    return denoiser.eval().requires_grad_(False)


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, by its name or its first bytes: a program, which whoever loads it would run."""
    if path.suffix.lower() in PICKLES:
        return True
    with path.open("rb") as file:
        head = file.read(2)
    # safetensors begin with a length, which may look like anything
    return path.suffix != ".safetensors" and len(head) == 2 and head[0] == 0x80 and 2 <= head[1] <= 5


def verified_card(folder: Path) -> dict[str, Any]:
    """The card of a denoiser's folder that holds no pickle and whose weights match their checksum.

    Raises CheckpointError otherwise.
    """
    card = read_card(folder, "denoiser")
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_pickle(path):
            raise CheckpointError(f"{path} is a pickle, which could run anything: a model folder holds none, remove it")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder} holds no model.safetensors: fetch the model again")
    sha256 = file_sha256(weights)
    if sha256 != card["weights_sha256"]:
        raise CheckpointError(
            f"{weights} has sha256 {sha256[:12]} and its card says {card['weights_sha256'][:12]}: fetch it again"
        )
    return card


def load_whole_model(folder: Path | str, device: torch.device | str = "cpu") -> Model:
    """`load_model` with its space and, for latents, the decoder that travels in the folder."""
    denoiser = load_model(folder).to(device)
    if torch.device(device).type == "cpu" and isinstance(denoiser.model, UNet):  # others may rely on the usual layout
        denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a tenth faster without gradients
    card = read_card(folder, "denoiser")
    space = Normalisation(card["space"]["kind"], tuple(card["space"]["mean"]), tuple(card["space"]["scale"]))
    autoencoder = None
    if space.kind == "latents":
        autoencoder = load_autoencoder(Path(folder) / "autoencoder", device)
    return Model(denoiser, space, autoencoder, card)


def save_checkpoint(folder: Path, state: TrainingState, identity: dict[str, Any]) -> None:
    """Write weights, averages and optimiser into an existing folder; `checkpoint.json` last."""
    write_checkpoint(folder, *checkpoint_content(state, identity))


def checkpoint_content(state: TrainingState, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A copy of all that a run goes on from, which training cannot change any more: tensors on the CPU, and a card."""
    tensors = {f"denoiser/{name}": tensor for name, tensor in state.denoiser.state_dict().items()}
    for index, ema in enumerate(state.emas):
        tensors |= {f"ema{index}/{name}": tensor for name, tensor in ema.module.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in moments.items()}
    card = {
        "format_version": CHECKPOINT_FORMAT,
        "step": state.step,
        "images_seen": state.images_seen,
        "crops_by_size": list(state.crops_by_size),
        "grad_scaler": state.scaler.state_dict(),
        **identity,
    }
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, card


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write `checkpoint_content` into an existing folder; `checkpoint.json` last."""
    save_file(tensors, folder / "state.safetensors")
    card = card | {"state_sha256": file_sha256(folder / "state.safetensors")}
    (folder / "checkpoint.json").write_text(json.dumps(card, indent=2) + "\n")


def load_checkpoint(folder: Path, state: TrainingState) -> None:
    """Bring `state` to where the checkpoint stood; raises CheckpointError where it is not whole."""
    card = _card_of(folder / "checkpoint.json", CHECKPOINT_FORMAT)
    if not (folder / "state.safetensors").is_file():
        raise CheckpointError(f"{folder} holds no state.safetensors: remove it to go on from the one before")
    if file_sha256(folder / "state.safetensors") != card["state_sha256"]:
        raise CheckpointError(f"{folder} does not match its checksum: remove it to go on from the one before")
    tensors = load_file(folder / "state.safetensors")

    def under(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    state.denoiser.load_state_dict(under("denoiser/"))
    for index, ema in enumerate(state.emas):
        ema.module.load_state_dict(under(f"ema{index}/"))
    optimizer = state.optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in under("optimizer/").items():
        parameter, moment = name.split("/")
        moments.setdefault(int(parameter), {})[moment] = tensor
    state.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
    if card.get("grad_scaler"):
        state.scaler.load_state_dict(card["grad_scaler"])
    state.step, state.crops_by_size = card["step"], card["crops_by_size"]


def save_average(path: Path, average: PowerEMA, images_seen: int) -> None:
    """Keep a power-function average as it stands, whole or not at all: parameters, and which profile they have."""
    parameters = {name: parameter.contiguous() for name, parameter in average.module.named_parameters()}
    profile = {
        "format_version": str(AVERAGE_FORMAT),
        "sigma_rel": repr(average.sigma_rel),
        "images_seen": str(images_seen),
    }
    partial = path.with_name(f".{path.name}.partial")
    save_file(parameters, partial, metadata=profile)
    partial.replace(path)


def read_profile(path: Path) -> PowerProfile:
    """Which average a file of `save_average` holds; raises CheckpointError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            profile = file.metadata() or {}
        return PowerProfile(float(profile["sigma_rel"]), float(profile["images_seen"]))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a kept average ({error}): remove it") from None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
