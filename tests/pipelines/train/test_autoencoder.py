"""Training of autoencoders: quality, registration, fine-tuning, and continuing after a kill."""

import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from helpers import wait_until
from PIL import Image
from safetensors.torch import load_file

from patchloom.errors import UserError
from patchloom.models.autoencoder import WEIGHTS, load_autoencoder
from patchloom.pipelines.train.autoencoder import (
    AutoencoderResult,
    AutoencoderSettings,
    reconstruct,
    reconstruction_quality,
    train_autoencoder,
)
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.storage import each_json_line, read_json
from patchloom.platform.records.run import read_progress
from patchloom.platform.tracking.registry import fetch_model

pytestmark = pytest.mark.ray
SETTINGS = AutoencoderSettings(widths=(8, 16), images=400, batch_size=4, patch=16, held_out_fraction=0.2)


def test_training_lowers_the_loss_and_registers_the_autoencoder(
    ray_cluster: None, pixels: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "ae"
    result = train_autoencoder(str(pixels), str(folder), SETTINGS, workers=2, register="tiny-ae")
    lines = list(each_json_line(folder / "progress.jsonl"))
    assert lines[-1]["images_seen"] == 400
    assert lines[-1]["loss"] < lines[0]["loss"]

    dataset = open_dataset(pixels)
    images = dataset.rows(dataset.indices("held_out", 0.2))["image"]
    decoded = reconstruct(load_autoencoder(result.model), images)
    errors = ((images.astype(float) - decoded) ** 2).mean((1, 2, 3))
    assert result.psnr_db == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), abs=1e-6)
    assert result.psnr_db > 12  # a grey image has less
    with Image.open(folder / "reconstructions.png") as picture:
        assert picture.height == 2 * (2 * 18 - 2)

    assert result.reference is not None
    fetched = fetch_model(result.reference)
    assert read_json(fetched.folder / "model.json") == read_json(result.model / "model.json")
    again = train_autoencoder(str(pixels), str(folder), SETTINGS, workers=2, register="tiny-ae")
    assert again == result
    with pytest.raises(UserError, match="--out"):
        train_autoencoder(str(pixels), str(folder), AutoencoderSettings(images=8, patch=16), workers=0)


@pytest.fixture(scope="module")
def finished(pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> AutoencoderResult:
    """A finished run without Ray, registered."""
    folder = tmp_path_factory.mktemp("finished") / "ae"
    return train_autoencoder(str(pixels), str(folder), SETTINGS, workers=0, register="finished-ae")


def test_diverged_training_ends_without_a_model(pixels: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, lr=1e12)
    with pytest.raises(UserError, match="--lr"):
        train_autoencoder(str(pixels), str(tmp_path / "ae"), settings, workers=0, register="diverged-ae")
    assert not (tmp_path / "ae" / "model").exists()
    assert read_progress(tmp_path / "ae")[-1].loss is None and "NaN" not in (tmp_path / "ae/progress.jsonl").read_text()
    assert not mlflow.MlflowClient().search_registered_models("name = 'diverged-ae'")


def test_mlflow_contains_quality_and_reconstructions(finished: AutoencoderResult, tmp_path: Path) -> None:
    client = mlflow.MlflowClient()
    run = client.get_run(finished.run_id)
    assert run.data.metrics["psnr_db"] == pytest.approx(finished.psnr_db)
    assert run.data.metrics["ssim"] == pytest.approx(finished.ssim)
    losses = client.get_metric_history(finished.run_id, "loss")
    assert losses[-1].step == 100 and losses[-1].value < losses[0].value
    kept = Path(client.download_artifacts(finished.run_id, "reconstructions.png", str(tmp_path)))
    assert kept.read_bytes() == (finished.model.parent / "reconstructions.png").read_bytes()
    name, version = str(finished.reference).removeprefix("models:/").split("/")
    tags = client.get_model_version(name, version).tags
    assert float(tags["psnr_db"]) == pytest.approx(finished.psnr_db, abs=1e-3)


def test_fine_tuning_starts_with_the_given_weights(finished: AutoencoderResult, pixels: Path, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> tuple[AutoencoderResult, float]:
        """The result of a short run, and the loss of its first ten steps."""
        settings = replace(SETTINGS, images=40, lr=1e-3, **changes)
        result = train_autoencoder(str(pixels), str(tmp_path / name), settings, workers=0)
        return result, next(each_json_line(tmp_path / name / "progress.jsonl"))["loss"]

    tuned, tuned_loss = run("tuned", init_from=finished.reference, widths=(99, 1))  # widths come from init_from
    scratch, scratch_loss = run("scratch")
    assert tuned_loss < 0.8 * scratch_loss
    assert tuned.psnr_db > finished.psnr_db - 1 and tuned.psnr_db > scratch.psnr_db + 2
    still = replace(SETTINGS, images=40, lr=0.0, init_from=str(finished.model))
    kept = train_autoencoder(str(pixels), str(tmp_path / "still"), still, workers=0)
    before, after, tuned_weights = (load_file(one.model / WEIGHTS) for one in (finished, kept, tuned))
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == tuned_weights.keys()
    assert not all(torch.equal(before[name], tuned_weights[name]) for name in before)


def test_fine_tuning_refuses_other_classes_of_autoencoders(pixels: Path, tmp_path: Path) -> None:
    import diffusers

    network = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    network.save_pretrained(tmp_path / "tiny", safe_serialization=True)
    settings = replace(SETTINGS, init_from=str(tmp_path / "tiny"))
    with pytest.raises(UserError, match=r"--init-from .*AutoencoderTiny"):
        train_autoencoder(str(pixels), str(tmp_path / "out"), settings, workers=0)


def test_scale_gives_latents_unit_variance(finished: AutoencoderResult, pixels: Path) -> None:
    autoencoder = load_autoencoder(finished.model)
    images = open_dataset(pixels).rows(range(48))["image"]
    mean, std = autoencoder.encode(torch.from_numpy(images))
    variance = float((mean.var() + std.square().mean()) * autoencoder.scale**2)
    assert variance == pytest.approx(1, rel=0.1)


def test_killed_training_continues_and_ends_with_the_same_weights(
    finished: AutoencoderResult, pixels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder\n"
        f"train_autoencoder({str(pixels)!r}, 'ae', {SETTINGS!r}, workers=0)"
    )
    process = Popen([sys.executable, "-c", code], cwd=tmp_path, text=True, stdout=PIPE, stderr=STDOUT)
    wait_until(lambda: newest_checkpoint(tmp_path / "ae") is not None, process)
    process.kill()
    process.communicate()
    killed_at = newest_checkpoint(tmp_path / "ae")
    assert killed_at is not None and not (tmp_path / "ae" / "model").exists()
    result = train_autoencoder(str(pixels), str(tmp_path / "ae"), SETTINGS, workers=0)
    assert f"from step {int(killed_at.name.removeprefix('step-'))} " in capsys.readouterr().out
    weights, wanted = (load_file(one.model / WEIGHTS) for one in (result, finished))
    assert weights.keys() == wanted.keys() and all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert (result.psnr_db, result.ssim) == (finished.psnr_db, finished.ssim)
    lines, wanted_lines = (
        [(line.step, line.images_seen, line.loss) for line in read_progress(one.model.parent)]
        for one in (result, finished)
    )
    assert lines == wanted_lines


def test_reconstruction_quality_of_known_pairs() -> None:
    images = np.full((2, 3, 16, 16), 100, np.uint8)
    assert reconstruction_quality(images, images + 10).psnr_db == pytest.approx(10 * np.log10(255**2 / 100))
    noise = np.random.default_rng(0).integers(0, 255, (2, 3, 16, 16), dtype=np.uint8)
    assert reconstruction_quality(noise, noise + 1).ssim > 0.99
    assert reconstruction_quality(noise, noise[::-1]).ssim < 0.3


def test_ssim_is_the_mean_over_uniform_windows_of_seven_pixels() -> None:
    one, other = np.random.default_rng(1).integers(0, 256, (2, 1, 3, 16, 16), dtype=np.uint8)
    a, b = (
        np.lib.stride_tricks.sliding_window_view(image[0].astype(float), (7, 7), axis=(1, 2)) for image in (one, other)
    )
    (mean_a, var_a), (mean_b, var_b) = ((x.mean((3, 4)), x.var((3, 4), ddof=1)) for x in (a, b))
    covariance = ((a * b).mean((3, 4)) - mean_a * mean_b) * 49 / 48
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # Wang et al. 2004
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    wanted = (luminance * (2 * covariance + c2) / (var_a + var_b + c2)).mean()
    assert reconstruction_quality(one, other).ssim == pytest.approx(wanted, abs=1e-9)


def test_patch_size_must_fit_the_halvings(pixels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--patch 10"):
        train_autoencoder(str(pixels), str(tmp_path / "ae"), AutoencoderSettings(patch=10), workers=0)


def test_widths_must_fit_the_group_normalisation(pixels: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--widths 4,8"):
        train_autoencoder(str(pixels), str(tmp_path / "ae"), AutoencoderSettings(widths=(4, 8), patch=16), workers=0)
