"""ControlNets in a run: latents, edges and texts of a dataset, a frozen base, checkpoints, samples and the registry."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from helpers import assert_equal_models, tiny_recipe
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny_base import TOKENS, WIDTH, save_tiny_base

from patchloom.errors import CheckpointError, UserError
from patchloom.models.autoencoder import new_autoencoder, save_autoencoder
from patchloom.models.checkpoints import load_sampling_model, read_card
from patchloom.models.conditions import depth_to_space
from patchloom.models.controlnet import BASE_FOLDER, ControlNetwork
from patchloom.models.generate import Sampling, generate_padded
from patchloom.models.precision import fixed_arithmetic
from patchloom.models.sampling_options import LADDER_NAMES
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.registry.convert import export_model
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train import train
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.recipe import Recipe, check_recipe

ROWS = 48


def recipe(base: Path, **changes: Any) -> Recipe:
    values = tiny_recipe(**{"optimizer__lr": 1e-3, **changes}).model_dump(mode="json")
    values["model"] = {"network": "controlnet", "base": str(base), "label_dropout": 0.2}
    values["data"] |= {"whiten": False}
    return check_recipe(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an autoencoder, and a dataset of latents (4, 8, 8) with edges and texts; row 7 has no text."""
    folder, random = tmp_path_factory.mktemp("controlled"), np.random.default_rng(0)
    save_tiny_base(folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (folder / "autoencoder").mkdir()
        save_autoencoder(new_autoencoder((8, 8), 4), folder / "autoencoder")
    coarse = random.integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=coarse.repeat(4, 1).repeat(4, 2))
    keyed = prepare(str(folder / "images.npz"), str(folder / "pixels"), crop="none", workers=0)
    keys = np.delete(keyed.rows(range(ROWS), ["key"])["key"], 7)
    texts = {key: random.normal(size=(TOKENS, WIDTH)) for key in keys}
    np.savez(folder / "texts.npz", no_text=random.normal(size=(TOKENS, WIDTH)), **texts)
    prepare(str(folder / "images.npz"), str(folder / "data"), crop="none", autoencoder=str(folder / "autoencoder"),
            condition="edges", text=str(folder / "texts.npz"), shard_rows=20, workers=0)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    train(recipe(folder / "base"), str(folder / "data"), str(folder / "run"), workers=0)
    return folder / "run"


def test_rows_have_the_texts_of_their_keys(folder: Path, tmp_path: Path) -> None:
    dataset = open_dataset(folder / "data")
    rows, texts = dataset.rows(range(len(dataset))), np.load(folder / "texts.npz")
    assert len(dataset) == ROWS - 1 and dataset.card.skipped.reasons == {"has no text": 1}
    assert rows["text"].dtype == np.float16 and rows["text"].shape == (ROWS - 1, TOKENS, WIDTH)
    for key, text in zip(rows["key"], rows["text"], strict=True):
        assert np.array_equal(text, texts[key].astype(np.float16))
    assert np.array_equal(dataset.no_text(), texts["no_text"].astype(np.float16))
    pixels = prepare(str(folder / "images.npz"), str(tmp_path / "pixels"), crop="none", condition="edges",
                     text=str(folder / "texts.npz"), workers=0)  # fmt: skip
    encoded = prepare(str(pixels.path), str(tmp_path / "latents"), autoencoder=str(folder / "autoencoder"), workers=0)
    for name, values in encoded.rows(range(len(encoded))).items():
        is_latent = name in ("mean", "std")  # whose last bit depends on the places in a batch
        assert np.allclose(values, rows[name], atol=2e-3) if is_latent else np.array_equal(values, rows[name])
    assert encoded.card.text == dataset.card.text and np.array_equal(encoded.no_text(), dataset.no_text())


def test_texts_can_be_in_a_store(folder: Path, s3: str) -> None:
    Folder(f"{s3}/texts").put(folder / "texts.npz", "texts.npz")
    prepare(str(folder / "images.npz"), f"{s3}/texts/data", crop="none", condition="edges",
            text=f"{s3}/texts/texts.npz", workers=0)  # fmt: skip
    there, here = open_dataset(f"{s3}/texts/data"), open_dataset(folder / "data")
    assert np.array_equal(there.no_text(), here.no_text())
    assert np.array_equal(there.rows(range(9), ["text"])["text"], here.rows(range(9), ["text"])["text"])


def test_files_that_are_no_texts_are_refused(folder: Path, tmp_path: Path) -> None:
    zeros = {"no_text": np.zeros((TOKENS, WIDTH))}
    for name, arrays in {"none": {"a": np.ones((2, 2))}, "zero": zeros, "flat": {"no_text": np.ones(3)}}.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(UserError, match="no_text"):
            prepare(str(folder / "images.npz"), str(tmp_path / "data"), crop="none", text=str(tmp_path / f"{name}.npz"),
                    workers=0)  # fmt: skip
    with pytest.raises(UserError, match=r"\.npz"):
        prepare(str(folder / "images.npz"), str(tmp_path / "data"), crop="none", text="texts.txt", workers=0)


def test_only_the_controlnet_is_trained(folder: Path, run: Path) -> None:
    weights = load_file(run / "model" / "model.safetensors")
    assert {name.split(".")[1] for name in weights} == {"controlnet", "no_text"}
    no_text = torch.from_numpy(open_dataset(folder / "data").no_text()).float()
    assert torch.equal(weights["model.no_text"], no_text)
    assert weights["model.controlnet.controlnet_mid_block.weight"].abs().max() > 0  # zero at the start
    card = read_card(run / "model")
    options = card.denoiser.network_options
    assert options["base_sha256"] == file_sha256(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    model = load_sampling_model(run / "model")
    assert isinstance(model.denoiser.model, ControlNetwork)
    stored = load_file(folder / "base" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.denoiser.model.frozen.state_dict().items())
    (checkpoint, *_) = sorted((run / "checkpoints").glob("*/state.safetensors"))
    assert not any("frozen" in name or "unet" in name for name in load_file(checkpoint))


def test_training_lowers_the_loss(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert lines[-1]["held_out_loss"] < lines[0].get("held_out_loss", lines[0]["loss"])
    assert set(lines[-1]["loss_by_patch_size"]) <= {"8", "4", "2"}


def test_a_run_that_continues_ends_with_the_same_weights(folder: Path, run: Path) -> None:
    shorter = str(folder / "shorter")
    train(recipe(folder / "base", train__images=300), str(folder / "data"), shorter, workers=0)
    train(recipe(folder / "base"), str(folder / "data"), shorter, workers=0, resume=True)
    assert_equal_models(run, folder / "shorter")


def test_a_run_with_another_base_is_refused(
    folder: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BASE_FOLDER, str(save_tiny_base(tmp_path / "other", seed=1)))
    with pytest.raises(UserError, match=r"model\.base"):
        train(recipe(folder / "base"), str(folder / "data"), str(run), workers=0, resume=True)


def test_samples_follow_the_conditions_and_texts_of_a_dataset(folder: Path, run: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 3, "batch": 4, "workers": 0, "guidance": 2.0}
    sample(str(run / "model"), str(tmp_path / "samples"), "0-5", conditions=str(folder / "data"), **options)
    model, rows = load_sampling_model(run / "model"), open_dataset(folder / "data").rows(range(6))
    shown, texts = torch.from_numpy(depth_to_space(rows["condition"], 2)), torch.from_numpy(rows["text"])
    sampling = Sampling(steps=3, guidance=2.0)
    with fixed_arithmetic():
        images = generate_padded(model, list(range(6)), [-1] * 6, 4, sampling, condition=shown, text=texts)
        without = generate_padded(model, list(range(6)), [-1] * 6, 4, sampling, condition=shown)
    for seed, image in enumerate(images):
        picture = Image.open(tmp_path / "samples" / "000000" / f"{seed:06d}.png")
        assert np.array_equal(np.asarray(picture).transpose(2, 0, 1), image)
    assert not torch.equal(images, without)
    with pytest.raises(ValueError, match="text"):
        generate_padded(model, [0], [-1], 1, sampling, condition=shown[:1], text=texts[:1, :, :3])


def test_ladders_stay_within_the_levels_of_the_base(run: Path) -> None:
    low, high = load_sampling_model(run / "model").denoiser.model.sigma_range  # type: ignore[union-attr, operator, misc]
    assert (low, high) == pytest.approx((0.02917, 14.6146), rel=1e-3)  # of Stable Diffusion 1
    for ladder in LADDER_NAMES:
        sigmas = Sampling(ladder=ladder, steps=12).sigmas((low, high))
        assert len(sigmas) == 13 and sigmas[-1] == 0 and (sigmas[:-1] > sigmas[1:]).all()
        assert sigmas[0] == pytest.approx(high) and sigmas[-2] == pytest.approx(low)


def test_a_version_is_exported_for_diffusers(folder: Path, run: Path, tmp_path: Path) -> None:
    reference = register(str(run), "edges-to-images")
    assert read_card(export_model(reference, str(tmp_path / "copy"))).denoiser.network == "controlnet"
    exported = ControlNetModel.from_pretrained(export_model(reference, str(tmp_path / "net"), diffusers=True))
    for name, library in (("copy", "patchloom"), ("net", "diffusers")):
        card = ModelCard.load(tmp_path / name / "README.md", ignore_metadata_errors=False)
        assert [card.data.to_dict()[key] for key in ("library_name", "pipeline_tag")] == [library, "text-to-image"]
        assert "controlnet" in card.data.tags and str(folder / "base").replace("_", "\\_") in card.text
    network: Any = load_sampling_model(run / "model").denoiser.model
    random = torch.Generator().manual_seed(0)
    x, image, text = (torch.randn(2, *shape, generator=random) for shape in ((4, 8, 8), (3, 16, 16), (TOKENS, WIDTH)))
    found, wanted = (net(x, 500, text, image, return_dict=False) for net in (exported, network.controlnet))
    for one, other in zip((*found[0], found[1]), (*wanted[0], wanted[1]), strict=True):
        assert torch.equal(one, other) and one.abs().max() > 0


def test_a_model_says_where_its_base_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BASE_FOLDER, str(run))
    with pytest.raises(CheckpointError, match=r"unet/config\.json"):
        load_sampling_model(run / "model")


def test_the_dry_run_counts_what_is_trained(folder: Path) -> None:
    plan = describe_plan(recipe(folder / "base"), str(folder / "data"))
    frozen = sum(tensor.numel() for tensor in load_file(
        folder / "base" / "unet" / "diffusion_pytorch_model.safetensors").values())  # fmt: skip
    assert plan.state_bytes == 4 * (plan.parameters * 5 + frozen)
    full = plan.sizes[0].flops_per_crop
    assert 2 * plan.evaluation_flops < full < 3 * plan.evaluation_flops  # the frozen encoder has no backward pass
    assert plan.step_bytes is not None and plan.step_bytes > 0
    describe_plan(recipe(folder / "base"), str(folder / "data"), measure=True)


def test_data_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    source, autoencoder = str(folder / "images.npz"), str(folder / "autoencoder")
    prepare(source, str(tmp_path / "plain"), crop="none", autoencoder=autoencoder, workers=0)
    with pytest.raises(UserError, match="--condition"):
        describe_plan(recipe(folder / "base"), str(tmp_path / "plain"))
    with pytest.raises(UserError, match=r"model\.base"):
        describe_plan(recipe(tmp_path / "nothing"), str(folder / "data"))
    save_tiny_base(tmp_path / "wide", cross_attention_dim=2 * WIDTH)
    with pytest.raises(UserError, match="width"):
        describe_plan(recipe(tmp_path / "wide"), str(folder / "data"))
    for changes in ({"model": {"network": "controlnet"}}, {"data": {"whiten": True}}, {"noise": {"mean": 0.0}}):
        values = recipe(folder / "base").model_dump(mode="json")
        with pytest.raises(UserError):
            check_recipe({**values, **changes})
