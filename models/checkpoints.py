"""Checkpoints: models and training states as safetensors and JSON, without pickles."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from patchloom.errors import CheckpointError
from patchloom.models.autoencoder import Autoencoder, load_autoencoder
from patchloom.models.cards import CHECKPOINT_FORMAT, MODEL_FORMAT, CheckpointCard, ModelCard, check_bounds
from patchloom.models.denoiser import Denoiser, build_checked, skeleton, to_channels_last
from patchloom.models.ema import PowerEMA, PowerProfile
from patchloom.models.manifest import check_manifest, check_regular, sha256_of_file, write_manifest
from patchloom.models.normalisation import Normalisation
from patchloom.models.replay import ReplayedNetwork
from patchloom.models.snapshots import load_edm_snapshot, read_edm_snapshot
from patchloom.models.step import TrainingState
from patchloom.models.unet import UNet
from patchloom.pickles import is_pickle

__all__ = [
    "CheckpointError",
    "SamplingModel",
    "check_saving",
    "checkpoint_content",
    "is_pickle",
    "load_checkpoint",
    "load_edm_snapshot",
    "load_model",
    "load_sampling_model",
    "read_card",
    "read_checkpoint_card",
    "read_edm_snapshot",
    "read_profile",
    "sampling_skeleton",
    "save_average",
    "save_checkpoint",
    "save_model",
    "stored_shapes",
    "verified_card",
    "write_checkpoint",
]

AVERAGE_FORMAT = 1


@dataclass(frozen=True)
class SamplingModel:
    """All that sampling needs.

    Args:
        denoiser: the network.
        normalisation: the map from its values to stored ones.
        autoencoder: the decoder of a latent model, None for pixels.
        card: its `model.json`.
        replayed: the network as CUDA graphs, for samplers; None: they call the network.
    """

    denoiser: Denoiser
    normalisation: Normalisation
    autoencoder: Autoencoder | None
    card: ModelCard
    replayed: ReplayedNetwork | None = None


def save_model(folder: Path, denoiser: Denoiser, card: ModelCard) -> None:
    """Write `model.safetensors`, `model.json` with the weights' sha256, and the manifest into an existing folder.

    All other files of the model are there already.
    """
    state = denoiser.state_dict()
    save_file(_without_shared_memory(state), folder / "model.safetensors")
    card = replace(card, tied=_tied_names(state) or None, weights_sha256=sha256_of_file(folder / "model.safetensors"))
    (folder / "model.json").write_text(json.dumps(card.to_json(), indent=2) + "\n")
    write_manifest(folder)


def check_saving(denoiser: Denoiser) -> None:
    """Save a denoiser to memory and load it again, so that a problem is found before the training.

    Raises:
        ValueError: its `state_dict` cannot be saved as safetensors or loaded again.
    """
    try:
        denoiser.load_state_dict(load(save(_without_shared_memory(denoiser.state_dict()))))
    except Exception as error:  # whatever the code of a backbone raises
        raise ValueError(f"the network cannot be saved and loaded ({' '.join(str(error).split())})") from error


def _without_shared_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors, with a copy of each that shares memory with an earlier one; safetensors need both."""
    tensors, seen = dict[str, Tensor](), set[int]()
    for name, tensor in state.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if place in seen else tensor.contiguous()
        seen.add(place)
    return tensors


def _tied_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that are an earlier tensor of the network, with the name of that one."""
    first = dict[tuple[int, torch.Size, tuple[int, ...]], str]()
    tied = dict[str, str]()
    for name, tensor in state.items():
        kept = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), name)
        if kept != name and tensor.numel():
            tied[name] = kept
    return tied


def read_card(folder: Path | str) -> ModelCard:
    """Read the `model.json` of a denoiser's folder; the weights are not verified.

    Raises:
        CheckpointError: the file is missing or damaged, describes something else, or has a newer format.
    """
    path = Path(folder) / "model.json"
    content = _read_json(path, MODEL_FORMAT)
    if content.get("kind") != "denoiser":
        raise CheckpointError(f"{folder} is a model of kind {content.get('kind')!r}, and a denoiser was wanted")
    if "weights_sha256" not in content:
        raise CheckpointError(f"{path} has no weights_sha256: fetch the model again")
    try:
        card = ModelCard.from_json(content)
        check_bounds(card.denoiser)
        return card
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): fetch the model again") from None


def _read_json(path: Path, newest_format: int) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: give a model folder or models:/NAME@ALIAS")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise CheckpointError(
            f"{path} has no format_version, so it is not a file of Patchloom: pass a model folder or models:/NAME@ALIAS"
        )
    if content["format_version"] > newest_format:
        raise CheckpointError(
            f"{path} has format {content['format_version']}, and this version reads up to {newest_format}: "
            "update patchloom"
        )
    return content


def load_model(folder: Path | str) -> Denoiser:
    """Load the denoiser of a model folder; needs torch and safetensors only.

    Returns:
        The network on the CPU, in eval mode and without gradients.

    Raises:
        CheckpointError: the folder has no model, the weights do not match their checksum, or the network comes
            from a package that is not allowed (`backbones.allow_backbones`).
    """
    folder = Path(folder)
    card = verified_card(folder)
    weights = folder / "model.safetensors"
    try:
        denoiser = build_checked(card.denoiser, stored_shapes(weights))
        denoiser.load_state_dict(load_file(weights))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    except (RuntimeError, SafetensorError) as error:  # weights of a backbone, or a damaged file
        raise CheckpointError(f"{folder}: {' '.join(str(error).split())[:500]}: fetch the model again") from None
    return denoiser.eval().requires_grad_(False)


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, by name, read from its header.

    Raises:
        CheckpointError: the header is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 no dictionary
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a complete safetensors file ({error}): fetch it again") from None


def verified_card(folder: Path) -> ModelCard:
    """Read the card of a denoiser's folder and verify the folder: no pickles, and the checksum of every file.

    Raises:
        CheckpointError: something is missing, damaged, a pickle or a link out of the folder.
    """
    card = read_card(folder)
    check_regular(folder)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_pickle(path):
            raise CheckpointError(f"{path} is a pickle, which can run any code: remove it from the model folder")
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"{folder} has no model.safetensors: fetch the model again")
    sha256 = sha256_of_file(weights)
    if sha256 != card.weights_sha256:
        raise CheckpointError(
            f"{weights} has sha256 {sha256[:12]} instead of {card.weights_sha256[:12]}: fetch it again"
        )
    check_manifest(folder, {weights.name: sha256})
    return card


def load_sampling_model(folder: Path | str, device: torch.device | str = "cpu") -> SamplingModel:
    """`load_model`, with the normalisation and, for latents, the decoder in the folder."""
    denoiser = load_model(folder).to(device)
    if torch.device(device).type == "cpu":
        to_channels_last(denoiser)  # 10% faster without gradients
    card = read_card(folder)
    autoencoder = None
    if card.normalisation.kind == "latents":
        autoencoder = load_autoencoder(Path(folder) / "autoencoder", device)
    is_replayed = torch.device(device).type == "cuda" and isinstance(denoiser.model, UNet)  # others may wait for it
    replayed = ReplayedNetwork(denoiser) if is_replayed else None
    return SamplingModel(denoiser, card.normalisation, autoencoder, card, replayed)


def sampling_skeleton(folder: Path | str) -> SamplingModel:
    """The model that `load_sampling_model` loads, with weights that have shapes but no memory."""
    card = read_card(folder)
    is_latent = card.normalisation.kind == "latents"
    autoencoder = load_autoencoder(Path(folder) / "autoencoder", "meta") if is_latent else None
    return SamplingModel(skeleton(card.denoiser).eval().requires_grad_(False), card.normalisation, autoencoder, card)


def save_checkpoint(folder: Path, state: TrainingState, recipe: str = "") -> None:
    """Write weights, averages and optimiser into an existing folder, then `checkpoint.json`.

    Args:
        folder: an existing folder.
        state: the state of the run.
        recipe: name of the recipe, for the card.
    """
    write_checkpoint(folder, *checkpoint_content(state, recipe))


def checkpoint_content(state: TrainingState, recipe: str = "") -> tuple[dict[str, Tensor], CheckpointCard]:
    """Copy all that a run needs to continue: tensors on the CPU and a card. Training can go on meanwhile."""
    tensors = {f"denoiser/{name}": tensor for name, tensor in state.denoiser.state_dict().items()}
    for index, ema in enumerate(state.emas):
        tensors |= {f"ema{index}/{name}": tensor for name, tensor in ema.module.state_dict().items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": tensor for name, tensor in moments.items()}
    card = CheckpointCard(
        step=state.step,
        images_seen=state.images_seen,
        crops_by_size=tuple(state.crops_by_size),
        grad_scaler=state.scaler.state_dict(),
        recipe=recipe,
    )
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, card


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], card: CheckpointCard) -> None:
    """Write `checkpoint_content` into an existing folder; `checkpoint.json` is written last."""
    save_file(tensors, folder / "state.safetensors")
    card = replace(card, state_sha256=sha256_of_file(folder / "state.safetensors"))
    (folder / "checkpoint.json").write_text(json.dumps(card.to_json(), indent=2) + "\n")


def read_checkpoint_card(folder: Path) -> CheckpointCard:
    """Read the `checkpoint.json` of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, or has a newer format.
    """
    path = folder / "checkpoint.json"
    try:
        return CheckpointCard.from_json(_read_json(path, CHECKPOINT_FORMAT))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): {_use_the_previous(folder)}") from None


def _use_the_previous(folder: Path) -> str:
    return f"remove {folder} to continue from the previous checkpoint"


def load_checkpoint(folder: Path, state: TrainingState) -> None:
    """Set `state` to that of a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged or has a newer format.
    """
    card = read_checkpoint_card(folder)
    if not (folder / "state.safetensors").is_file():
        raise CheckpointError(f"{folder} has no state.safetensors: {_use_the_previous(folder)}")
    if sha256_of_file(folder / "state.safetensors") != card.state_sha256:
        raise CheckpointError(f"{folder}/state.safetensors does not match its checksum: {_use_the_previous(folder)}")
    tensors = load_file(folder / "state.safetensors")
    state.denoiser.load_state_dict(_below("denoiser/", tensors))
    for index, ema in enumerate(state.emas):
        ema.module.load_state_dict(_below(f"ema{index}/", tensors))
    optimizer = state.optimizer.state_dict()
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer/", tensors).items():
        parameter, moment = name.split("/")
        moments.setdefault(int(parameter), {})[moment] = tensor
    state.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
    _adopt_layout(state.optimizer)
    if card.grad_scaler:
        state.scaler.load_state_dict(dict(card.grad_scaler))
    state.step, state.crops_by_size = card.step, list(card.crops_by_size)


def _adopt_layout(optimizer: torch.optim.Optimizer) -> None:
    """Store moments in the layout of their parameters: fused Adam reads both in the order of their memory."""
    for parameter, moments in optimizer.state.items():
        for name, moment in moments.items():
            if moment.shape == parameter.shape and moment.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter).copy_(moment)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def save_average(path: Path, average: PowerEMA, images_seen: int) -> None:
    """Save a power-function average with its profile; an interrupted call leaves no file."""
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
    """Read the profile of an average.

    Raises:
        CheckpointError: `save_average` did not write the file.
    """
    try:
        with safe_open(path, "pt") as file:
            profile = file.metadata() or {}
        return PowerProfile(float(profile["sigma_rel"]), float(profile["images_seen"]))
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a saved average ({error}): remove it") from None
