"""Snapshots: pickles of EDM and Patch Diffusion, read without running any of their code.

A pickle is a program. This reader knows the names that an EDM or Patch Diffusion snapshot needs, and replaces each by
something harmless (a tensor, a number, a bag of attributes). It refuses every other name without importing it. Python
source inside a snapshot is never compiled.
"""

import contextlib
import io
import math
import mmap
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from patchloom.errors import CheckpointError
from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_checked
from patchloom.models.patches import COORDINATE_CHANNELS
from patchloom.pickles import scan_pickle

PRECONDITIONINGS = ("EDMPrecond", "Patch_EDMPrecond")
MOST_DIMENSIONS, MOST_MODULES, MOST_DEPTH = 8, 20_000, 50  # of a tensor and of a network
NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}

# EDM's names of constructor arguments, and ours.
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
SNAPSHOT_NETWORKS = {"SongUNet": ("song", SONG_ARGUMENTS), "DhariwalUNet": ("dhariwal", SHARED_ARGUMENTS)}
# Arguments that do not describe the network, or that `_config` reads by name.
OTHER_ARGUMENTS = {"img_resolution", "in_channels", "out_channels", "label_dim", "label_dropout",
                   "encoder_type", "decoder_type", "channel_mult_emb", "implicit_mlp"}  # fmt: skip


def load_edm_snapshot(path: str | Path) -> Denoiser:
    """Load the averaged denoiser of an EDM or Patch Diffusion snapshot, without running code of the file.

    Args:
        path: `network-snapshot-*.pkl`.

    Returns:
        The network on the CPU, in eval mode and without gradients.

    Raises:
        CheckpointError: the file is not such a snapshot, is truncated, or names anything but tensors and plain values.
    """
    return read_edm_snapshot(path)[0]


def read_edm_snapshot(path: str | Path) -> tuple[Denoiser, DenoiserConfig]:
    """`load_edm_snapshot`, with the configuration of the network; raises the same errors."""
    snapshot = _read(Path(path))
    if not isinstance(snapshot, dict) or not isinstance(snapshot.get("ema"), _Record):
        raise CheckpointError(f"{path} has no `ema` network: pass a network-snapshot-*.pkl of EDM or Patch Diffusion")
    return _denoiser(snapshot["ema"], path)


class _Record(dict[str, Any]):
    """A bag of attributes in place of an object. Creating and filling it runs no code of the file."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.update(state)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            scan_pickle(content)
            content.seek(0)
            return _SnapshotUnpickler(content, path).load()  # a map returns no more bytes than there are
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle may raise anything
        what = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path} is not a complete pickle of a snapshot ({what}): fetch it again") from None


class _SnapshotUnpickler(pickle.Unpickler):
    """Reads a pickle with harmless replacements for the names that snapshots need, and refuses all other names."""

    def __init__(self, file: mmap.mmap, path: Path) -> None:
        super().__init__(cast(BinaryIO, file))
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        """The replacement of a name; raises CheckpointError for other names."""
        if (module, name) in RECORDS:
            return type("_Attributes", (_Record,), {})  # a new class each time: a file can leave nothing behind
        if (module, name) not in REBUILDERS:
            shown = f"{module}.{name}"[:200].encode("unicode_escape").decode()
            raise CheckpointError(
                f"{self.path} names {shown}, which no snapshot needs: it is refused and nothing was run"
            )
        rebuild = REBUILDERS[module, name]
        return lambda *arguments: rebuild(self.path, *arguments)


def _persistent(path: Path, meta: object) -> _Record:
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise _damaged(path, "a persistent object has no state")
    record = _Record()
    record.update(meta["state"], class_name=str(meta.get("class_name")))
    return record


def _storage(path: Path, content: object) -> Any:
    if not isinstance(content, bytes):
        raise _damaged(path, "the storage of a tensor is not bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # pickle protocols that torch does not write
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        names = re.findall(r"GLOBAL (\S+)", str(error)) or _names_in(content)
        problem = f"name {', '.join(names)}" if names else "are not a storage"
        raise CheckpointError(f"{path}: the bytes of a tensor {problem}: refused, nothing was run") from None


def _tensor(path: Path, stored: Any, offset: int, size: Any, stride: Any, *_: object) -> Tensor:
    if not isinstance(stored, torch.storage.TypedStorage):
        raise _damaged(path, "a tensor has no storage")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or len(size) > MOST_DIMENSIONS or not all(_is_size(number) for number in numbers):
        raise _damaged(path, "the shape of a tensor is not valid")
    values = stored._untyped_storage.nbytes() // stored.dtype.itemsize
    if math.prod(size) > values:  # a stride of 0 repeats values
        raise _damaged(path, f"a tensor of {math.prod(size):,} values has {values:,}")
    empty = torch.empty(0, dtype=stored.dtype)
    return empty.set_(stored._untyped_storage, offset, tuple(size), tuple(stride))


def _is_size(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < 2**40


def _parameter(path: Path, value: Any, *_: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise _damaged(path, "a parameter is not a tensor")
    return value


def _number_type(path: Path, name: object, *_: object) -> _Record:
    if name not in NUMBERS:
        raise CheckpointError(f"{path}: the number type {name!r} is refused: only plain numbers are read")
    record = _Record()
    record["type"] = name
    return record


def _number(path: Path, kind: object, content: object) -> Any:
    import numpy as np

    if not isinstance(kind, _Record) or kind.get("type") not in NUMBERS or not isinstance(content, bytes):
        raise _damaged(path, "a number is not valid")
    return np.frombuffer(content, np.dtype(kind["type"]))[0].item()


def _latin1_bytes(path: Path, text: object, encoding: object = "latin1") -> bytes:
    """Bytes as old pickle protocols write them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _damaged(path, "bytes are not valid")
    return text.encode("latin1")


def _damaged(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path}: {problem}: fetch the snapshot again")


# Names that become a bag of attributes.
RECORDS = {
    ("builtins", "set"),
    ("__builtin__", "set"),  # pickle protocols below 4
    ("collections", "OrderedDict"),
    ("dnnlib.util", "EasyDict"),
    ("torch.nn.modules.container", "ModuleDict"),
    ("torch.nn.modules.container", "ModuleList"),
    ("torch.nn.modules.container", "Sequential"),
    ("torch.nn.modules.activation", "SiLU"),
}
# Names that become a function of the file's path and the pickled arguments.
REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _latin1_bytes,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _number_type,
    ("numpy.core.multiarray", "scalar"): _number,
    ("numpy._core.multiarray", "scalar"): _number,
}


def _names_in(content: bytes) -> list[str]:
    """The names that a pickle would import, read from its opcodes without running them."""
    names, strings = [], [""]
    with contextlib.suppress(Exception):  # the pickle may be truncated
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
        raise CheckpointError(f"{path} holds a {ema.get('class_name')}: give a snapshot of {wanted}")
    network = _modules(ema).get("model")
    if not isinstance(network, _Record) or network.get("class_name") not in SNAPSHOT_NETWORKS:
        found = network.get("class_name") if isinstance(network, _Record) else None
        raise CheckpointError(f"{path} holds a network {found}: give one of {', '.join(SNAPSHOT_NETWORKS)}")
    arguments = dict(network.get("_init_kwargs") or {})
    try:
        stored = _tensors(ema)
        elements, most = sum(map(torch.numel, stored.values())), Path(path).stat().st_size
        if elements > most:  # several tensors may share values, and each of ours has its own
            raise ValueError(f"{elements:,} values in a file of {most:,} bytes")
        config = _config(network["class_name"], arguments, ema, stored)
        denoiser = build_checked(config, {name: tuple(value.shape) for name, value in stored.items()})
        denoiser.load_state_dict({name: value.float() for name, value in stored.items()})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} has tensors that do not fit the network it describes ({reason}): fetch the snapshot again"
        ) from None
    return denoiser.eval().requires_grad_(False), config


def _config(class_name: str, arguments: dict[str, Any], ema: _Record, tensors: dict[str, Tensor]) -> DenoiserConfig:
    network, names = SNAPSHOT_NETWORKS[class_name]
    unknown = sorted(set(arguments) - set(names) - OTHER_ARGUMENTS)
    if unknown:
        raise ValueError(f"unknown network arguments: {', '.join(unknown)}")
    if arguments.get("decoder_type", "standard") != "standard" or arguments.get("channel_mult_emb", 4) != 4:
        raise ValueError("decoder_type and channel_mult_emb differ from DDPM++, NCSN++ and ADM")
    options = {name: arguments[key] for key, name in names.items() if key in arguments}
    if network == "song":
        encoder = arguments.get("encoder_type", "standard")
        if encoder not in ("standard", "residual"):
            raise ValueError(f"encoder_type is {encoder!r} instead of standard or residual")
        options["residual_input"] = encoder == "residual"
    resolution, channels = arguments["img_resolution"], arguments["out_channels"]
    extra = arguments["in_channels"] - channels
    coordinates = "linear" if extra else "none"
    if arguments.get("implicit_mlp"):
        coordinates, options["stem"] = "implicit", _stem_widths(tensors, f"model.enc.{resolution}x{resolution}_conv.")
    if extra != COORDINATE_CHANNELS[coordinates]:
        raise ValueError(f"the network has {extra} more input than output channels instead of 0 or 2")
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
    """Widths of the 1x1 convolutions before the first 3x3 convolution."""
    weights = [tensor for name, tensor in tensors.items() if name.startswith(prefix) and name.endswith("weight")]
    return [len(weight) for weight in weights if weight.shape[-1] == 1]


def _modules(record: _Record) -> dict[str, Any]:
    modules = record.get("_modules")
    return modules if isinstance(modules, dict) else {}


def _tensors(ema: _Record) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name, as in a `state_dict`; raises ValueError for what no network is like."""
    found: dict[str, Tensor] = {}
    waiting, modules = [("", ema, 0)], 0
    while waiting:
        prefix, record, depth = waiting.pop()
        modules += 1
        if modules > MOST_MODULES or depth > MOST_DEPTH:  # modules may be in others several times, or in themselves
            raise ValueError(f"more than {MOST_MODULES:,} modules, or more than {MOST_DEPTH} inside one another")
        for kind in ("_parameters", "_buffers"):
            values = record.get(kind)
            for name, value in values.items() if isinstance(values, dict) else ():
                if isinstance(value, Tensor):
                    found[f"{prefix}{name}"] = value
        for name, module in reversed(_modules(record).items()):
            if isinstance(module, _Record):
                waiting.append((f"{prefix}{str(name)[:200]}.", module, depth + 1))
    return found
