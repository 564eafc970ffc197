"""Snapshots of every variant that EDM and Patch Diffusion trained give the same numbers as the network in them."""

import json
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from patchloom.models.cards import DenoiserConfig
from patchloom.models.checkpoints import CheckpointError, load_edm_snapshot, read_edm_snapshot
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.layers import Dropout
from patchloom.models.patches import coordinate_grid

Write = Callable[..., Path]
CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.Sequential, nn.SiLU)
HOOKS = ("_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")
SONG: dict[str, Any] = {
    "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.1,
    "embedding_type": "positional", "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard",
    "resample_filter": [1, 1], "channel_mult_emb": 4, "label_dropout": 0,
}  # fmt: skip
NCSNPP = {**SONG, "embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
          "resample_filter": [1, 3, 3, 1]}  # fmt: skip
ADM: dict[str, Any] = {
    "model_channels": 64, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.1,
    "channel_mult_emb": 4, "label_dropout": 0,
}  # fmt: skip


class Persistent:
    """Pickles as `torch_utils.persistence` makes an object pickle: a call with the object's state."""

    reconstruct: Callable[..., Any]  # the foreign module's, while a snapshot is written
    source = ""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.class_name}
        return type(self).reconstruct, ({**meta, "state": self.state},)


def in_their_layout(module: nn.Module) -> Any:
    """A module as the reference holds it: containers are torch's, every other module a persistent object."""
    children = {name: in_their_layout(child) for name, child in module.named_children() if not is_ours_alone(child)}
    if isinstance(module, CONTAINERS):
        container = type(module)()
        container._modules.update(children)
        return container
    transient = module._non_persistent_buffers_set
    state: dict[str, Any] = {
        "training": False,
        "_parameters": OrderedDict(module._parameters),
        "_buffers": OrderedDict((name, value) for name, value in module._buffers.items() if name not in transient),
        "_non_persistent_buffers_set": set(),
        **{hooks: OrderedDict() for hooks in HOOKS},
        "_modules": OrderedDict(children),
        "skip_scale": np.sqrt(0.5),
        "_init_args": (),
        "_init_kwargs": {},
    }
    return Persistent(type(module).__name__, state)


def is_ours_alone(module: nn.Module) -> bool:
    return isinstance(module, Dropout)  # a function there


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a denoiser as a snapshot; the modules that its pickle names exist only meanwhile."""

    def snapshot(denoiser: Denoiser, protocol: int = 4, wrapper: str = "Patch_EDMPrecond", **arguments: Any) -> Path:
        witness = tmp_path / "ran"
        network = in_their_layout(denoiser.model)
        extra = {"linear": 2, "implicit": 2, "none": 0}[denoiser.coordinates]
        sizes = {"img_resolution": denoiser.resolution, "in_channels": denoiser.channels + extra,
                 "out_channels": denoiser.channels, "label_dim": denoiser.classes}  # fmt: skip
        network.state["_init_kwargs"] = {**sizes, **arguments}
        state = {"_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict(model=network),
                 "sigma_min": 0, "sigma_max": float("inf"), "sigma_data": denoiser.sigma_data,
                 "use_fp16": False}  # fmt: skip
        modules = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib",
                                                             "dnnlib.util")}  # fmt: skip

        def _reconstruct_persistent_obj(meta: Any) -> Any:
            raise AssertionError("a snapshot is written here and not read")

        for made, home in ((_reconstruct_persistent_obj, "torch_utils.persistence"),
                           (type("EasyDict", (dict,), {}), "dnnlib.util")):  # fmt: skip
            made.__module__, made.__qualname__ = home, made.__name__
            setattr(modules[home], made.__name__, made)
        assert not sys.modules.keys() & modules.keys()
        sys.modules.update(modules)
        Persistent.reconstruct = staticmethod(_reconstruct_persistent_obj)
        Persistent.source = f"open({str(witness)!r}, 'w').close()\n"
        try:
            content = {
                "ema": Persistent(wrapper, state),
                "loss_fn": Persistent("Patch_EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": 0.5}),
                "augment_pipe": Persistent("AugmentPipe", {"p": 0.12, "xflip": 1e8, "scale_std": np.float32(0.2)}),
                "dataset_kwargs": modules["dnnlib.util"].EasyDict(resolution=denoiser.resolution, use_labels=False),
            }
            path = tmp_path / "network-snapshot-000001.pkl"
            path.write_bytes(pickle.dumps(content, protocol))
        finally:
            for name in modules:
                del sys.modules[name]
            del Persistent.reconstruct
        return path

    return snapshot


def network_of(arguments: dict[str, Any], network: str = "song", **changes: Any) -> Denoiser:
    """Our network with weights that are all far from zero; `arguments` are EDM's."""
    names = {"model_channels": "width", "channel_mult": "width_multipliers", "num_blocks": "blocks",
             "attn_resolutions": "attention", "dropout": "dropout", "augment_dim": "augmentation",
             "embedding_type": "embedding", "resample_filter": "filter_taps",
             "channel_mult_noise": "noise_width_multiplier"}  # fmt: skip
    options = {names[name]: value for name, value in arguments.items() if name in names}
    options["residual_input"] = arguments.get("encoder_type") == "residual"
    if network == "dhariwal":
        del options["residual_input"]
    options |= changes.pop("network_options", {})
    config = DenoiserConfig(network=network, network_options=options, resolution=16, channels=3, classes=0,
                            coordinates="linear", sigma_data=0.5)  # fmt: skip
    config = replace(config, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        denoiser = build_denoiser(config).eval()
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, 0.0, 0.1)
    return denoiser.requires_grad_(False)


def reread(config: DenoiserConfig) -> DenoiserConfig:
    """The description as `model.json` gives it back."""
    return DenoiserConfig.from_json(json.loads(json.dumps(config.to_json())))


def assert_same(ours: Denoiser, loaded: Denoiser) -> None:
    """Every weight, and the outputs at two patch sizes with every condition that the network takes."""
    assert not loaded.training
    wanted, found = ours.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    generator = torch.Generator().manual_seed(0)
    for size in (16, 8):
        x = torch.randn(2, ours.channels, size, size, generator=generator)
        where = None
        if ours.coordinates != "none":
            where = coordinate_grid(16, 16)[None, :, -size:, :size].expand(2, -1, -1, -1)
        labels = torch.eye(ours.classes)[:2] if ours.classes else None
        sigma = torch.tensor([0.2, 3.0])
        one, other = (denoiser(x, sigma, where, labels) for denoiser in (ours, loaded))
        assert torch.equal(one, other)
        assert float((one - x).abs().max()) > 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("coordinates", "wrapper"), [("linear", "Patch_EDMPrecond"), ("none", "EDMPrecond")])
def test_images_of_any_channels_with_and_without_coordinates(
    write: Write, channels: int, coordinates: str, wrapper: str
) -> None:
    ours = network_of(SONG, channels=channels, coordinates=coordinates)
    loaded, config = read_edm_snapshot(write(ours, wrapper=wrapper, **SONG))
    assert (config.channels, config.coordinates) == (channels, coordinates)
    assert_same(ours, loaded)


@pytest.mark.parametrize(
    ("network", "arguments", "classes"), [("song", SONG, 4), ("song", NCSNPP, 0), ("dhariwal", ADM, 4)]
)
def test_all_three_networks_and_classes(write: Write, network: str, arguments: dict[str, Any], classes: int) -> None:
    ours = network_of(arguments, network, classes=classes)
    loaded = load_edm_snapshot(write(ours, **arguments))
    assert loaded.classes == classes
    assert_same(ours, loaded)


@pytest.mark.parametrize(("network", "arguments"), [("song", SONG), ("song", NCSNPP), ("dhariwal", ADM)])
def test_augmentation_weights_are_kept_and_used(write: Write, network: str, arguments: dict[str, Any]) -> None:
    arguments = {**arguments, "augment_dim": 9}
    ours = network_of(arguments, network)
    loaded, config = read_edm_snapshot(write(ours, **arguments))
    assert config.network_options["augmentation"] == 9
    assert_same(ours, loaded)
    weight = loaded.state_dict()["model.map_augment.weight"]
    assert weight.shape[1] == 9 and torch.equal(weight, ours.state_dict()["model.map_augment.weight"])
    x, labels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.ones(2, 9)
    told = loaded(x, 0.5, augmentation=labels)
    assert torch.equal(told, ours(x, 0.5, augmentation=labels))
    assert float((told - loaded(x, 0.5)).abs().max()) > 1e-4
    assert torch.equal(loaded(x, 0.5, augmentation=torch.zeros(2, 9)), loaded(x, 0.5))


@pytest.mark.parametrize(("network", "arguments"), [("song", SONG), ("dhariwal", ADM)])
def test_without_augmentation_an_argument_of_0_makes_no_weights(
    write: Write, network: str, arguments: dict[str, Any]
) -> None:
    ours = network_of(arguments, network)
    loaded = load_edm_snapshot(write(ours, **arguments, augment_dim=0))
    assert not [name for name in loaded.state_dict() if "augment" in name]
    assert_same(ours, loaded)


# Patch Diffusion's `implicit_mlp`: three 1x1 convolutions as wide as the network, each with a SiLU, and the 3x3
@pytest.mark.parametrize(
    ("network", "arguments", "stem"),
    [("song", SONG, [8, 8, 8]), ("song", NCSNPP, [8, 8, 8]), ("dhariwal", ADM, [64, 64, 64]), ("song", SONG, [12])],
)
def test_implicit_coordinates_are_a_stem_of_1x1_convolutions(
    write: Write, network: str, arguments: dict[str, Any], stem: list[int]
) -> None:
    ours = network_of(arguments, network, coordinates="implicit", network_options={"stem": stem})
    loaded, config = read_edm_snapshot(write(ours, **arguments, implicit_mlp=True))
    assert config.coordinates == "implicit"
    assert config.network_options["stem"] == stem
    names = [name for name in loaded.state_dict() if name.startswith("model.enc.16x16_conv.")]
    layers = [2 * number for number in range(len(stem) + 1)]
    assert names == [f"model.enc.16x16_conv.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert_same(ours, loaded)


def test_implicit_mlp_that_is_off_is_linear(write: Write) -> None:
    ours = network_of(SONG)
    loaded = load_edm_snapshot(write(ours, **SONG, implicit_mlp=False))
    assert loaded.coordinates == "linear"
    assert_same(ours, loaded)


@pytest.mark.parametrize("home", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numpys_numbers_of_its_new_and_its_old_home_are_numbers(write: Write, home: str) -> None:
    arguments = {**SONG, "model_channels": np.int64(8), "channel_mult": [np.int32(1), np.int64(2)],
                 "dropout": np.float64(0.1), "num_blocks": np.uint8(1), "implicit_mlp": np.bool_(False)}  # fmt: skip
    ours = network_of(SONG, classes=2)
    ours.sigma_data = np.float64(0.5)  # type: ignore[assignment]
    path = write(ours, **arguments)
    content = path.read_bytes()
    written = np.float64(1).__reduce__()[0].__module__
    assert content.count(called(written)) == 1  # named once, and called for every number
    # the first frame promises the old length: a byte that comes after the end keeps the promise
    path.write_bytes(content.replace(called(written), called(home)) + bytes(len(written) - len(home)))
    loaded, config = read_edm_snapshot(path)
    assert reread(config) == config
    assert config.network_options["width_multipliers"] == [1, 2]
    assert (loaded.sigma_data, config.network_options["dropout"]) == (0.5, 0.1)
    ours.sigma_data = 0.5
    assert_same(ours, loaded)


def called(home: str) -> bytes:
    """A module's name as a pickle holds it: SHORT_BINUNICODE, its length, its letters."""
    return b"\x8c" + bytes([len(home)]) + home.encode()


@pytest.mark.parametrize("protocol", [4, 5])
def test_pickles_of_python_3_8_and_later_are_read(write: Write, protocol: int) -> None:
    ours = network_of(SONG)
    assert_same(ours, load_edm_snapshot(write(ours, protocol, **SONG)))


def test_the_description_builds_the_network_that_the_weights_fit(write: Write) -> None:
    arguments = {**NCSNPP, "augment_dim": 9}
    ours = network_of(arguments, classes=2, sigma_data=0.25)
    loaded, config = read_edm_snapshot(write(ours, **arguments, implicit_mlp=False))
    assert config.sigma_data == loaded.sigma_data == 0.25
    rebuilt = build_denoiser(reread(config)).eval()
    rebuilt.load_state_dict(loaded.state_dict())
    assert_same(ours, rebuilt)


def test_weights_in_half_precision_are_read_as_float32(write: Write) -> None:
    ours = network_of(SONG)
    for parameter in ours.parameters():
        parameter.data = parameter.data.half()
    loaded = load_edm_snapshot(write(ours, **SONG))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_same(ours.float(), loaded)


def test_the_source_that_travels_along_is_not_run_and_no_foreign_module_is_needed(write: Write, tmp_path: Path) -> None:
    path = write(network_of(SONG), **SONG)
    assert str(tmp_path / "ran").encode() in path.read_bytes()
    load_edm_snapshot(path)
    assert not (tmp_path / "ran").exists()
    assert not {"torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util"} & sys.modules.keys()


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_channels": 16}, r"\[3, 16, 3, 3\]"),
        ({"channel_mult": [1, 2, 2]}, "4x4"),
        ({"augment_dim": 9}, "map_augment"),
        ({"in_channels": 4}, r"\b1 "),
        ({"in_channels": 27}, r"\b24 "),
        ({"encoder_type": "skip"}, "encoder_type.*'skip'"),
        ({"decoder_type": "skip"}, "decoder_type"),
        ({"channel_mult_emb": 2}, "channel_mult_emb"),
        ({"flash": True}, "flash"),
        ({"img_resolution": 15}, "multiples of 2"),
    ],
)
def test_arguments_that_contradict_the_tensors_are_refused(write: Write, changes: dict[str, Any], words: str) -> None:
    path = write(network_of(SONG), **{**SONG, **changes})
    with pytest.raises(CheckpointError, match=words) as refusal:
        load_edm_snapshot(path)
    assert str(path) in str(refusal.value)


def test_another_preconditioning_is_refused_by_name(write: Write) -> None:
    path = write(network_of(SONG), wrapper="VPPrecond", **SONG)
    with pytest.raises(CheckpointError, match="VPPrecond"):
        load_edm_snapshot(path)
