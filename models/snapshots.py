"""Snapshots: EDM's pickles read without running anything that stands in them.

A pickle is a program. This reader knows the dozen names that an EDM or Patch Diffusion snapshot needs, gives
each an inert meaning (a tensor, a number, a bag of attributes), and refuses every other name before it is
looked up. Python source that travels in a snapshot is never compiled.
"""

import contextlib
import io
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchloom.errors import CheckpointError
from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.patches import COORDINATE_CHANNELS

PRECONDITIONINGS = ("EDMPrecond", "Patch_EDMPrecond")
NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}

# EDM's constructor arguments in our words.
SHARED_ARGUMENTS = {
    "model_channels": "width",
    "channel_mult": "width_multipliers",
    "num_blocks": "blocks",
    "attn_resolutions": "attention",
    "dropout": "dropout",
    "augment_dim": "augmentation",
}
SONG_ARGUMENTS = SHARED_ARGUMENTS | {
    "embedding_type": "embedding",
    "resample_filter": "filter_taps",
    "channel_mult_noise": "noise_width_multiplier",
}
NETWORKS = {"SongUNet": ("song", SONG_ARGUMENTS), "DhariwalUNet": ("dhariwal", SHARED_ARGUMENTS)}
# Arguments that say nothing about the network, or that the reader handles by name.
OTHER_ARGUMENTS = {"img_resolution", "in_channels", "out_channels", "label_dim", "label_dropout",
                   "encoder_type", "decoder_type", "channel_mult_emb", "implicit_mlp"}  # fmt: skip


def load_edm_snapshot(path: str | Path) -> Denoiser:
    """The averaged denoiser of an EDM or Patch Diffusion snapshot (`network-snapshot-*.pkl`), in eval mode.

    Raises CheckpointError for a file that is no such snapshot, that is cut off, or that names anything but
    tensors and plain values: the name is in the message, and nothing of the file has been run.
    """
    return read_edm_snapshot(path)[0]


def read_edm_snapshot(path: str | Path) -> tuple[Denoiser, DenoiserConfig]:
    """`load_edm_snapshot` with the network's description, as `build_denoiser` takes it; raises the same."""
    snapshot = _read(Path(path))
    if not isinstance(snapshot, dict) or not isinstance(snapshot.get("ema"), _Record):
        raise CheckpointError(f"{path} holds no `ema` network: give an EDM snapshot (network-snapshot-*.pkl)")
    return _denoiser(snapshot["ema"], path)


class _Record(dict[str, Any]):
    """A bag of attributes in place of an object; making or filling one runs nothing of the file."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _inert_reader(file, path).load()
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle may raise anything
        what = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not a whole pickle of a snapshot ({what}): fetch it again") from None


def _inert_reader(file: Any, path: Path) -> pickle.Unpickler:
    """An unpickler whose world is made anew for one file, so that a file cannot leave anything behind."""

    class Attributes(_Record):
        pass

    def persistent(meta: object) -> _Record:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise CheckpointError(f"{path}: a persistent object has no state: fetch the snapshot again")
        record = Attributes()
        record.update(meta["state"], class_name=str(meta.get("class_name")))
        return record

    def storage(content: object) -> Any:
        if not isinstance(content, bytes):
            raise CheckpointError(f"{path}: a tensor's storage is no bytes: fetch the snapshot again")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of pickle protocols that torch does not write
                return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:
            named = re.findall(r"GLOBAL (\S+)", str(error)) or _names_in(content)
            what = f"name {', '.join(named)}" if named else "are no storage"
            raise CheckpointError(f"{path}: a tensor's bytes {what}: refused, nothing was run") from None

    def tensor(stored: Any, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
        if not isinstance(stored, torch.storage.TypedStorage):
            raise CheckpointError(f"{path}: a tensor has no storage: fetch the snapshot again")
        empty = torch.empty(0, dtype=stored.dtype)
        return empty.set_(stored._untyped_storage, offset, tuple(size), tuple(stride))

    def parameter(value: Any, *_: object) -> Tensor:
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: a parameter is no tensor: fetch the snapshot again")
        return value

    def number_type(name: object, *_: object) -> Any:
        if name not in NUMBERS:
            raise CheckpointError(f"{path}: the number type {name!r} is refused: only plain numbers are read")
        record = Attributes()
        record["type"] = name
        return record

    def number(kind: Any, content: object) -> Any:
        import numpy as np

        if not isinstance(kind, Attributes) or not isinstance(content, bytes):
            raise CheckpointError(f"{path}: a number is damaged: fetch the snapshot again")
        return np.frombuffer(content, np.dtype(kind["type"]))[0].item()

    def latin1_bytes(text: object, encoding: object = "latin1") -> bytes:  # how old pickle protocols write bytes
        if not isinstance(text, str) or encoding != "latin1":
            raise CheckpointError(f"{path}: bytes are damaged: fetch the snapshot again")
        return text.encode("latin1")

    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("_codecs", "encode"): latin1_bytes,
        ("builtins", "set"): Attributes,  # protocols below 4
        ("__builtin__", "set"): Attributes,
        ("collections", "OrderedDict"): Attributes,
        ("dnnlib.util", "EasyDict"): Attributes,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch.storage", "_load_from_bytes"): storage,
        ("numpy", "dtype"): number_type,
        ("numpy.core.multiarray", "scalar"): number,
        ("numpy._core.multiarray", "scalar"): number,
        ("torch.nn.modules.container", "ModuleDict"): Attributes,
        ("torch.nn.modules.container", "ModuleList"): Attributes,
        ("torch.nn.modules.container", "Sequential"): Attributes,
        ("torch.nn.modules.activation", "SiLU"): Attributes,
    }

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in known:
                raise CheckpointError(
                    f"{path} names {module}.{name}, which no snapshot needs: refused, nothing was run"
                )
            return known[module, name]

    return Reader(file)


def _names_in(content: bytes) -> list[str]:
    """What a pickle would import, read from its opcodes without running them, for the refusal's words."""
    names, strings = [], [""]
    with contextlib.suppress(Exception):  # whatever comes after the last whole opcode
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    return names


def _denoiser(ema: _Record, path: str | Path) -> tuple[Denoiser, DenoiserConfig]:
    if ema.get("class_name") not in PRECONDITIONINGS:
        wanted = " or ".join(PRECONDITIONINGS)
        raise CheckpointError(f"{path} holds a {ema.get('class_name')}, and {wanted} was wanted")
    network = _modules(ema).get("model")
    if not isinstance(network, _Record) or network.get("class_name") not in NETWORKS:
        found = network.get("class_name") if isinstance(network, _Record) else None
        raise CheckpointError(f"{path} holds a network {found}, and one of {', '.join(NETWORKS)} was wanted")
    arguments = dict(network.get("_init_kwargs") or {})
    try:
        tensors = {name: value.float() for name, value in _tensors(ema).items()}
        config = _config(network["class_name"], arguments, ema, tensors)
        denoiser = build_denoiser(config)
        denoiser.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: its tensors do not fit the network that it describes ({reason})") from None
    return denoiser.eval().requires_grad_(False), config


def _config(class_name: str, arguments: dict[str, Any], ema: _Record, tensors: dict[str, Tensor]) -> DenoiserConfig:
    network, names = NETWORKS[class_name]
    unknown = sorted(set(arguments) - set(names) - OTHER_ARGUMENTS)
    if unknown:
        raise ValueError(f"its network takes {', '.join(unknown)}, which is not known here")
    if arguments.get("decoder_type", "standard") != "standard" or arguments.get("channel_mult_emb", 4) != 4:
        raise ValueError("its network has another decoder or embedding than DDPM++, NCSN++ and ADM")
    options = {ours: arguments[theirs] for theirs, ours in names.items() if theirs in arguments}
    if network == "song":
        encoder = arguments.get("encoder_type", "standard")
        if encoder not in ("standard", "residual"):
            raise ValueError(f"its network has the encoder {encoder!r}, and standard or residual was wanted")
        options["residual_input"] = encoder == "residual"
    resolution, channels = arguments["img_resolution"], arguments["out_channels"]
    extra = arguments["in_channels"] - channels
    coordinates = "linear" if extra else "none"
    if arguments.get("implicit_mlp"):
        coordinates, options["stem"] = "implicit", _stem_widths(tensors, f"model.enc.{resolution}x{resolution}_conv.")
    if extra != COORDINATE_CHANNELS[coordinates]:
        raise ValueError(f"its network has {extra} more input than output channels, and 0 or 2 was wanted")
    return DenoiserConfig(
        network=network,
        network_options=options,
        resolution=resolution,
        channels=channels,
        classes=arguments.get("label_dim", 0),
        coordinates=coordinates,
        sigma_data=float(ema["sigma_data"]),
    )


def _stem_widths(tensors: dict[str, Tensor], prefix: str) -> list[int]:
    """Widths of the 1x1 convolutions that stand before the first 3x3."""
    weights = [tensor for name, tensor in tensors.items() if name.startswith(prefix) and name.endswith("weight")]
    return [len(weight) for weight in weights if weight.shape[-1] == 1]


def _modules(record: _Record) -> dict[str, Any]:
    modules = record.get("_modules")
    return modules if isinstance(modules, dict) else {}


def _tensors(record: _Record, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers by dotted names, as `state_dict` has them."""
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in (record.get(kind) or {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
    for name, module in _modules(record).items():
        if isinstance(module, _Record):
            found |= _tensors(module, f"{prefix}{name}.")
    return found
