"""Inception: TensorFlow's resize against its definition, its layout, and weights of either naming."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import photograph

from patchloom.errors import CheckpointError
from patchloom.models.features import TorchScriptFeatures, features_of_file
from patchloom.models.inception import Inception, inception_state, load_inception, tensorflow_resize


def test_the_resize_starts_at_the_first_pixel_and_repeats_the_last() -> None:
    row = torch.tensor([[[[0.0, 2.0]]]])
    assert tensorflow_resize(row.expand(1, 1, 2, 2), 4)[0, 0, 0].tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize("length", [3, 32, 64, 299, 400])
def test_the_resize_is_tensorflows_definition(length: int) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (length, length)).astype(np.float64)
    places = np.arange(299) * (length / 299)
    # linear between the pixels at 0, 1, ...; numpy's interpolation repeats the last one beyond it
    wanted = np.stack([np.interp(places, np.arange(length), row) for row in image])
    wanted = np.stack([np.interp(places, np.arange(length), column) for column in wanted.T]).T
    found = tensorflow_resize(torch.from_numpy(image).float()[None, None], 299)[0, 0].numpy()
    assert np.abs(found - wanted).max() < 0.02  # places and values of 255 in float32, as TensorFlow has them


@pytest.fixture(scope="module")
def network() -> Inception:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Inception().eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 4:  # the scale is the same in all layers, so the last ones depend on the image
                torch.nn.init.kaiming_normal_(parameter)
        for name, buffer in network.named_buffers():
            if "num_batches" not in name:  # means and variances as training leaves them
                buffer.copy_(torch.rand_like(buffer) + 0.5 if name.endswith("var") else torch.randn_like(buffer) * 0.1)
    return network


def test_features_have_the_shapes_of_fid_and_sfid(network: Inception) -> None:
    found = network(torch.zeros(2, 3, 20, 30, dtype=torch.uint8))
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {
        "pool64": (2, 64), "pool": (2, 2048), "spatial": (2, 2023),
    }  # fmt: skip
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_802_784 - 17_216  # of the 1008-class port


TORCH_FIDELITY = Path(sys.prefix) / "torch-fidelity" / "torch_fidelity"  # `make .venv/.ready` installs it there


@pytest.fixture(scope="module")
def torch_fidelity(network: Inception, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    """The Inception of torch-fidelity, with the weights of ours and a random classifier."""
    if not TORCH_FIDELITY.is_dir():
        pytest.skip(f"{TORCH_FIDELITY} is missing: `make .venv/.ready` installs it")
    weights = tmp_path_factory.mktemp("weights") / "weights.pth"
    # its __init__ imports torchvision; an empty package in its place finds the same files
    package = ModuleType("torch_fidelity")
    package.__path__ = [str(TORCH_FIDELITY)]
    with pytest.MonkeyPatch.context() as patched, torch.random.fork_rng():
        head = {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.zeros(1008)}
        torch.save(network.state_dict() | head, weights)
        patched.setitem(sys.modules, "torch_fidelity", package)
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        theirs: torch.nn.Module = module.FeatureExtractorInceptionV3("inception", ["64", "2048"], str(weights))
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        del sys.modules[name]
    weights.unlink()
    return theirs


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 350)])
def test_features_are_those_of_torch_fidelity(
    network: Inception, torch_fidelity: torch.nn.Module, height: int, width: int
) -> None:
    cat = torch.from_numpy(photograph("chelsea.png")[:height, -width:].copy()).permute(2, 0, 1)
    images = torch.stack([cat, 255 - cat.flip(2)])
    spatial: list[torch.Tensor] = []
    branch = torch_fidelity.get_submodule("Mixed_6d.branch1x1")
    hook = branch.register_forward_hook(lambda _, __, output: spatial.append(output[:, :7]))
    early, pool = torch_fidelity(images)
    hook.remove()
    state, classifier = inception_state(torch_fidelity.state_dict())
    assert classifier is not None and torch.equal(classifier, torch_fidelity.get_parameter("fc.weight"))
    wanted = {"pool64": early, "spatial": spatial[0].permute(0, 2, 3, 1).flatten(1), "pool": pool}
    for found in (network(images), load_inception(state)(images)):
        for name, rows in wanted.items():
            assert rows.diff(dim=0).abs().max() > 0.2 * rows.abs().max()  # the images have different features
            assert (found[name] - rows).abs().max() < 1e-5 * rows.abs().max(), name


def test_folded_normalisations_change_nothing(network: Inception) -> None:
    state, _ = inception_state(network.state_dict())
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, folded = network(images), load_inception(state)(images)
    for name, rows in plain.items():
        assert torch.allclose(rows, folded[name], rtol=1e-3, atol=1e-4 * float(rows.abs().max())), name


def test_tensorflows_names_are_the_same_layers_in_the_same_order(network: Inception) -> None:
    state, _ = inception_state(network.state_dict())
    layers = list(dict.fromkeys(name.rsplit(".", 2)[0] for name in state))
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(layers):
        tensors[f"layers.{number}.weight"] = state[f"{layer}.conv.weight"]
        tensors[f"layers.{number}.beta"] = state[f"{layer}.bn.bias"]
        tensors[f"layers.{number}.mean"] = state[f"{layer}.bn.running_mean"]
        tensors[f"layers.{number}.var"] = state[f"{layer}.bn.running_var"]
    tensors["output.weight"] = torch.ones(1008, 2048)
    found, classifier = inception_state(tensors)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)  # gains are 1 in both
    assert classifier is not None and classifier.shape == (1008, 2048)


def test_other_networks_are_refused(network: Inception, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"Conv2d_1a_3x3\.conv\.weight"):
        inception_state({"conv.weight": torch.zeros(3)})
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth"):
        with pytest.raises(CheckpointError, match=name):
            features_of_file(tmp_path / name)


def test_a_pickle_that_would_run_is_not_run(tmp_path) -> None:  # type: ignore[no-untyped-def]
    class Hostile:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (tmp_path / "ran").touch, ()

    torch.save({"weights": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(CheckpointError, match=r"hostile\.pth.*pickle"):
        features_of_file(tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()


class Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


def test_any_torchscript_module_gives_features(tmp_path) -> None:  # type: ignore[no-untyped-def]
    torch.jit.script(Means()).save(tmp_path / "means.pt")
    features = features_of_file(tmp_path / "means.pt")
    assert isinstance(features, TorchScriptFeatures) and features.name == "means"
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    assert torch.allclose(features(images)["pool"], images.float().mean((2, 3)))
