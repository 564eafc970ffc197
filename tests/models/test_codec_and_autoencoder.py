"""Pixels survive the way to the network and back, and latents are those of diffusers."""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from patchloom.errors import CheckpointError
from patchloom.models.autoencoder import (
    DiffusersAutoencoder,
    autoencoder_files,
    autoencoder_loss,
    copy_autoencoder,
    load_autoencoder,
    new_autoencoder,
    save_autoencoder,
)
from patchloom.models.codec import to_pixels
from patchloom.models.normalisation import Normalisation, pixel_normalisation


@pytest.fixture(scope="module")
def network() -> Iterator[Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield new_autoencoder(widths=(8, 16, 16), latent_channels=4).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 16, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_every_grey_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    seen = pixel_normalisation().normalise(levels)
    torch.testing.assert_close(seen, levels / 127.5 - 1)
    assert torch.equal(to_pixels(seen, pixel_normalisation(), None), levels)
    torch.testing.assert_close(pixel_normalisation().restore(seen), levels.float())


def test_values_beyond_the_range_are_clipped() -> None:
    x = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5)
    assert to_pixels(x, pixel_normalisation(1), None).flatten().tolist() == [0, 0, 128, 255, 255]


def test_whitened_latents_have_mean_0_and_deviation_sigma_data_in_every_channel() -> None:
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(8, 3, 16, 16, generator=generator) * torch.tensor([1.0, 5.0, 0.2])[:, None, None] + 7
    by_channel = stored.transpose(0, 1).flatten(1).double()
    mean, std = by_channel.mean(1), by_channel.std(1, correction=0)
    space = Normalisation("latents", tuple(mean.tolist()), tuple((0.5 / std).tolist()))
    white = space.normalise(stored).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(white.mean(1), torch.zeros(3, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(white.std(1, correction=0), torch.full((3,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(space.restore(space.normalise(stored)), stored)


def test_latents_without_an_autoencoder_are_refused() -> None:
    with pytest.raises(ValueError, match="autoencoder"):
        to_pixels(torch.zeros(1, 4, 4, 4), Normalisation("latents", (0,) * 4, (1,) * 4), None)


def test_encoding_is_diffusers_own_of_images_in_minus_1_to_1(network: Any, images: Tensor) -> None:
    autoencoder = DiffusersAutoencoder(network)
    mean, std = autoencoder.encode(images)
    posterior = network.encode(images.float() / 127.5 - 1).latent_dist
    assert mean.shape == std.shape == (2, 4, 4, 6)
    assert mean.dtype == std.dtype == torch.float32
    assert (std > 0).all()
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(std, posterior.std)


def test_decoding_gives_bytes_of_the_images_size(network: Any, images: Tensor) -> None:
    autoencoder = DiffusersAutoencoder(network)
    mean, _ = autoencoder.encode(images)
    decoded = autoencoder.decode(mean)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.uint8
    exact = network.decode(mean).sample.double() * 127.5 + 128
    assert float((decoded.double() + 0.5 - exact.clamp(0, 255.5)).abs().max()) <= 0.501


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_encodes_and_decodes_in_it(network: Any, images: Tensor, half: torch.dtype) -> None:
    autoencoder, computed = DiffusersAutoencoder(network), set[torch.dtype]()
    mean, std = autoencoder.encode(images)
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    hooks = [each.register_forward_hook(lambda _, __, out: computed.add(out.dtype)) for each in convolutions]
    with torch.autocast("cpu", half):
        moments, decoded = autoencoder.encode(images), autoencoder.decode(mean)
    for hook in hooks:
        hook.remove()
    assert computed == {half}
    for found, wanted in zip(moments, (mean, std), strict=True):
        assert found is not None and wanted is not None and found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)
    assert float((decoded.float() - autoencoder.decode(mean).float()).abs().mean()) < 1


def test_a_decoder_that_overflows_in_half_precision_is_an_error(network: Any, images: Tensor) -> None:
    network = deepcopy(network)
    network.decoder.conv_out.weight.mul_(1e6)
    autoencoder = DiffusersAutoencoder(network)
    mean, _ = autoencoder.encode(images)
    assert autoencoder.decode(mean).shape == images.shape  # clipped to 0..255 in float32
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match=r"not finite.*float16.*fp32"):
        autoencoder.decode(mean)


def test_latents_go_back_to_pixels_through_the_space_and_the_decoder(network: Any, images: Tensor) -> None:
    autoencoder = DiffusersAutoencoder(network)
    mean, _ = autoencoder.encode(images)
    space = Normalisation("latents", (0.3, -0.2, 0.0, 1.0), (2.0, 4.0, 0.5, 1.0))
    found, wanted = to_pixels(space.normalise(mean), space, autoencoder), autoencoder.decode(mean)
    assert int((found.int() - wanted.int()).abs().max()) <= 1  # rounding may tip a value over a grey level


def test_a_saved_autoencoder_comes_back_as_it_was(network: Any, images: Tensor, tmp_path: Path) -> None:
    sha256 = save_autoencoder(network, tmp_path)
    loaded = load_autoencoder(tmp_path)
    assert loaded.weights_sha256 == sha256
    assert (loaded.downscale, loaded.latent_channels) == (4, 4)
    mean, std = loaded.encode(images)
    wanted_mean, wanted_std = DiffusersAutoencoder(network).encode(images)
    assert torch.equal(mean, wanted_mean)
    assert torch.equal(std, wanted_std)


def test_changed_or_missing_weights_are_refused(network: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no diffusion_pytorch_model\.safetensors"):
        load_autoencoder(tmp_path)
    save_autoencoder(network, tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="sha256"):
        load_autoencoder(tmp_path)


def test_no_file_of_a_folder_chooses_the_class_or_runs_code(network: Any, images: Tensor, tmp_path: Path) -> None:
    save_autoencoder(network, tmp_path)
    ran = tmp_path / "ran"
    (tmp_path / "pipeline.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    (tmp_path / "model_index.json").write_text('{"_class_name": ["pipeline", "Own"], "own": ["pipeline", "Own"]}')
    assert load_autoencoder(tmp_path).decode(load_autoencoder(tmp_path).encode(images)[0]).shape == images.shape
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("DiffusionPipeline", "UNet2DModel", "AutoencoderTiny", "pipeline", None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": name}))
        with pytest.raises(CheckpointError, match="names the class"):
            load_autoencoder(tmp_path)
        if name != "AutoencoderTiny":
            with pytest.raises(CheckpointError, match="names the class"):
                DiffusersAutoencoder.load(tmp_path, "cpu", torch.float32)
    assert not ran.exists()


def test_changed_added_or_missing_files_are_refused(network: Any, tmp_path: Path) -> None:
    save_autoencoder(network, tmp_path)
    before = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(before.replace("0.18215", "0.5"))
    with pytest.raises(CheckpointError, match=r"config\.json was changed"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(before)
    (tmp_path / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"more\.safetensors is not in files\.json"):
        load_autoencoder(tmp_path)
    (tmp_path / "more.safetensors").unlink()
    for content in ("{", "[]", '{"format_version": 1, "files": 3}'):
        (tmp_path / "files.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"files\.json is damaged"):
            load_autoencoder(tmp_path)
    (tmp_path / "files.json").unlink()  # as an earlier version wrote it
    load_autoencoder(tmp_path)


def test_only_the_files_of_an_autoencoder_are_copied(network: Any, tmp_path: Path) -> None:
    folder = tmp_path / "autoencoder"
    folder.mkdir()
    save_autoencoder(network, folder)
    (tmp_path / "private").write_text("private")
    (folder / "notes.json").symlink_to(tmp_path / "private")
    (folder / "more.bin").write_bytes(b"")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")  # as in the cache of Hugging Face
    copy_autoencoder(folder, tmp_path / "copy")
    names = ["config.json", "diffusion_pytorch_model.safetensors", "files.json", "model.json"]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == names
    assert not any(path.is_symlink() for path in (tmp_path / "copy").iterdir())
    load_autoencoder(tmp_path / "copy")
    (folder / "model.json").write_text('{"format_version": 1, "class": "own_codec:Fragile"}')
    with pytest.raises(CheckpointError, match="link out of the model folder"):
        autoencoder_files(folder)


def test_the_loss_is_the_absolute_error_plus_the_weighted_kl_of_a_latent_value(network: Any, images: Tensor) -> None:
    x = images.float() / 127.5 - 1
    without, with_kl = (autoencoder_loss(network, x, kl, torch.Generator().manual_seed(1)) for kl in (0.0, 2.0))
    mean, std = DiffusersAutoencoder(network).encode(images)
    kl = kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(with_kl - without, 2 * kl, rtol=1e-4, atol=1e-5)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    decoded = network.decode(mean + std * noise).sample
    torch.testing.assert_close(without, (decoded - x).abs().mean())


@pytest.mark.parametrize(
    "change",
    [{"mean": [float("nan")] * 3}, {"scale": [0.0] * 3}, {"scale": [float("inf")] * 3}, {"mean": [1.0]},
     {"mean": "abc"}, {"mean": [None] * 3}, {"kind": "other"}],
)  # fmt: skip
def test_normalisation_without_finite_numbers_is_refused(change: dict[str, Any]) -> None:
    content = pixel_normalisation().to_json()
    assert Normalisation.from_json(content) == pixel_normalisation()
    with pytest.raises(ValueError, match="normalisation"):
        Normalisation.from_json(content | change)
