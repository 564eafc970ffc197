"""Old versions: datasets, runs, samples, searches and registered models that version 0.1.0 wrote still work."""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import environment, shard_hashes
from safetensors.torch import load_file

from patchloom.models.checkpoints import load_model
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.prepare import prepare
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.report import report
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train import train
from patchloom.platform.dataset import open_dataset
from patchloom.platform.recipe import load_recipe
from patchloom.platform.records.run import RunCard
from patchloom.platform.tracking.client import connect

FIXTURES = [Path(__file__).parent / "fixtures" / name for name in ("version_0_1.tar.xz", "version_0_1_more.tar.xz")]
# where they were made; the MLflow stores and some cards hold these paths
PLACES = ("/tmp/patchloom-world", "/tmp/patchloom-fixture")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of version 0.1.0, unpacked as the working folder, with their own MLflow store."""
    folder = tmp_path_factory.mktemp("world")
    for fixture in FIXTURES:
        with tarfile.open(fixture) as archive:
            archive.extractall(folder, filter="data")
    for place in PLACES:
        for path in folder.rglob("*"):
            if path.suffix in (".json", ".yaml") or path.name == "MLmodel":
                path.write_text(path.read_text().replace(place, str(folder)))
        for store in (folder, folder / "store"):
            _move_store(store / "mlflow.db", place, str(folder))
    with environment(MLFLOW_TRACKING_URI=f"sqlite:///{folder / 'mlflow.db'}"), contextlib.chdir(folder):
        connect()  # MLflow itself keeps the store of the last test of this process otherwise
        yield folder


def _move_store(database: Path, place: str, folder: str) -> None:
    """Put another place for the one that an MLflow store was made at, in every text of every table."""
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                if "CHAR" in kind.upper() or "TEXT" in kind.upper():
                    connection.execute(
                        f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE {column} LIKE ?",
                        (place, folder, f"%{place}%"),
                    )


def patchloom(*arguments: str) -> str:
    """What a command prints; it must end with exit code 0."""
    command = [sys.executable, "-m", "patchloom.pipelines.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout


def modification_times(folder: Path) -> dict[str, int]:
    """When each file of a folder was last written; a lock comes and goes."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every image of a sample folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("0*/*.png")
    }


def test_datasets_open_and_match_their_checksums(world: Path) -> None:
    pixels, latents = open_dataset(world / "pixels"), open_dataset(world / "latents")
    for dataset in (pixels, latents):
        dataset.verify()
        assert len(dataset) == 48
        assert dataset.class_names == ["chelsea", "coffee"]
    assert pixels.rows([0])["image"].shape == (1, 3, 16, 16)
    assert latents.card["autoencoder"]["downscale"] == 2
    assert pixels.card["skipped"]["count"] == 1


def test_the_same_preparation_finds_the_dataset_complete(world: Path) -> None:
    before = modification_times(world / "pixels")
    prepare("images", "pixels", resolution=16, shard_rows=20, workers=0)
    assert before == modification_times(world / "pixels")


def test_an_unfinished_preparation_is_completed(world: Path) -> None:
    finished = {path.name: path.stat().st_mtime_ns for path in (world / "pixels_unfinished" / "shards").iterdir()}
    assert 4 <= len(finished) < 49
    prepare("images", "pixels_unfinished", resolution=16, shard_rows=1, workers=0)
    prepare("images", "pixels_fresh", resolution=16, shard_rows=1, workers=0)
    assert shard_hashes(world / "pixels_unfinished") == shard_hashes(world / "pixels_fresh")
    for name in sorted(finished)[:3]:
        assert (world / "pixels_unfinished" / "shards" / name).stat().st_mtime_ns == finished[name]


@pytest.mark.parametrize(("run", "data"), [("run", "pixels"), ("latent_run", "latents")])
def test_a_finished_run_has_nothing_to_do(world: Path, run: str, data: str) -> None:
    before = (world / run / "model" / "model.safetensors").stat().st_mtime_ns
    result = train(load_recipe(world / run / "recipe.yaml"), data, run, workers=0, resume=True)
    assert result.last["images_seen"] >= 600
    assert result.run_id == json.loads((world / run / "run.json").read_text())["run_id"]
    assert (world / run / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_killed_run_continues_to_the_same_weights(world: Path) -> None:
    train(load_recipe(world / "recipe.yaml"), "pixels", "run_unfinished", workers=0, resume=True)
    resumed, whole = (load_file(world / run / "model" / "model.safetensors") for run in ("run_unfinished", "run"))
    assert resumed.keys() == whole.keys()
    for name, weights in whole.items():  # another processor than the one that made the fixture may round otherwise
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=1e-4)
    assert RunCard.read(world / "run_unfinished").format_version == 1  # it keeps its draws and its order of rows
    train(load_recipe(world / "recipe.yaml"), "pixels", "run_new", workers=0)
    assert RunCard.read(world / "run_new").format_version == 2
    new = load_file(world / "run_new" / "model" / "model.safetensors")
    assert max(float((new[name] - weights).abs().max()) for name, weights in whole.items()) > 1e-3


def test_models_load(world: Path) -> None:
    for run in ("run", "latent_run"):
        denoiser = load_model(world / run / "model")
        assert denoiser.classes == 2
    assert load_model(world / "run" / "model").channels == 3


def test_an_average_of_another_length_is_made_of_kept_snapshots(world: Path) -> None:
    patchloom("models", "average", "latent_run", "average", "--sigma-rel", "0.12")
    assert load_model(world / "average").channels == 4


def test_a_finished_autoencoder_run_has_nothing_to_do(world: Path) -> None:
    before = (world / "autoencoder" / "model" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    settings = ["--widths", "8,16", "--images", "200", "--batch-size", "4", "--patch", "16", "--workers", "0"]
    patchloom("autoencoder", "train", "pixels", "--out", "autoencoder", *settings)
    assert (world / "autoencoder" / "model" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before


def test_a_finished_sample_folder_has_nothing_to_do(world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (world / "samples").rglob("*.png")}
    manifest = (world / "samples" / "manifest.jsonl").read_bytes()
    sample("models:/tiny@champion", "samples", "0-19", steps=3, workers=0)
    assert before == {path: path.stat().st_mtime_ns for path in (world / "samples").rglob("*.png")}
    assert manifest == (world / "samples" / "manifest.jsonl").read_bytes()
    sample("run", "samples_zip", "0-19", steps=3, format="zip", workers=0)
    assert len((world / "samples_zip" / "manifest.jsonl").read_text().splitlines()) == 20


def test_an_unfinished_sample_folder_is_completed_with_the_same_bytes(world: Path) -> None:
    kept = contents(world / "samples_unfinished")
    assert 8 <= len(kept) < 20
    sample("run", "samples_unfinished", "0-19", steps=3, workers=0)
    sample("run", "samples_fresh", "0-19", steps=3, workers=0)
    completed, fresh = contents(world / "samples_unfinished"), contents(world / "samples_fresh")
    # the kept images are the old ones, which another processor may have rounded otherwise; the others were made now
    assert completed == fresh | kept
    lines = [json.loads(line) for line in (world / "samples_unfinished" / "manifest.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == list(range(20))


def test_measured_samples_have_a_page(world: Path) -> None:
    measured = json.loads((world / "samples" / "metrics.json").read_text())
    page = report("samples", "samples.html").read_text()
    assert f"{measured['metrics']['frechet_distance']:.4g}" in page
    again = evaluate("samples", "pixels", features="colours", workers=0, out="again.json")
    assert again["metrics"]["frechet_distance"] == pytest.approx(measured["metrics"]["frechet_distance"], rel=1e-6)


@pytest.mark.parametrize("folder", ["run", "latent_run", "search"])
def test_runs_and_searches_have_pages(world: Path, folder: str) -> None:
    assert "<svg" in report(folder, f"{folder}.html").read_text()


@pytest.mark.ray
def test_a_finished_search_has_nothing_to_do(world: Path) -> None:
    before = (world / "search" / "trials.jsonl").read_text().splitlines()
    patchloom("tune", "search.yaml", "--data", "pixels", "--out", "search", "--restore")
    after = (world / "search" / "trials.jsonl").read_text().splitlines()
    assert [json.loads(line)["held_out_loss"] for line in before] == [
        json.loads(line)["held_out_loss"] for line in after
    ]


def test_registered_versions_are_listed_compared_sampled_and_promoted(world: Path) -> None:
    versions = json.loads(patchloom("models", "list", "--json"))
    assert sorted(int(version["version"]) for version in versions if version["name"] == "tiny") == [1, 2]
    assert json.loads(patchloom("models", "show", "models:/tiny@champion", "--json"))
    assert json.loads(patchloom("models", "compare", "models:/tiny/1", "models:/tiny/2", "--no-picture", "--json"))
    sample("models:/tiny/2", "latent_samples", "0-3", steps=2, workers=0)
    assert len(contents(world / "latent_samples")) == 4
    assert register("run", "tiny") == "models:/tiny/1"  # the same weights are the same version
    patchloom("models", "promote", "tiny", "2", "--alias", "candidate")
    assert register("latent_run", "tiny", alias="candidate") == "models:/tiny/2"


def test_a_registered_version_loads_through_mlflow(world: Path) -> None:
    import mlflow
    import pandas as pd

    model = mlflow.pyfunc.load_model("models:/tiny@champion")
    answer = model.predict(pd.DataFrame({"seed": [0, 3]}), params={"steps": 3})
    assert list(answer["seed"]) == [0, 3]
    assert list(answer["label"]) == [0, 1]
    sample("models:/tiny@champion", "pyfunc_samples", "0,3", steps=3, workers=0)
    images = {base64.b64decode(png) for png in answer["png"]}
    assert {hashlib.sha256(image).hexdigest() for image in images} == set(contents(world / "pyfunc_samples").values())


def test_an_unfinished_encoding_is_completed(world: Path) -> None:
    shards = world / "latents_unfinished" / "shards"
    before = modification_times(shards)
    assert len(before) == 3  # the third one was killed before its note, so it is made again
    options = {"autoencoder": "small_autoencoder", "mirror": True, "shard_rows": 16, "workers": 0}
    prepare("pixels", "latents_unfinished", **options)
    prepare("pixels", "latents_fresh", **options)
    after, fresh = shard_hashes(world / "latents_unfinished"), shard_hashes(world / "latents_fresh")
    assert after.keys() == fresh.keys()
    kept = ["part-00000.arrow", "part-00001.arrow"]
    assert [modification_times(shards)[name] for name in kept] == [before[name] for name in kept]
    assert [after[name] for name in after if name not in kept] == [fresh[name] for name in fresh if name not in kept]
    resumed, whole = (open_dataset(world / name).rows(range(96)) for name in ("latents_unfinished", "latents_fresh"))
    assert list(resumed["key"]) == list(whole["key"])
    for column in ("mean", "std"):  # kept shards are another processor's, which may round otherwise
        torch.testing.assert_close(torch.from_numpy(resumed[column]), torch.from_numpy(whole[column]))


def test_samples_with_notes_of_a_killed_call_are_completed(world: Path) -> None:
    before = modification_times(world / "samples_noted" / "000000")
    result = sample("run", "samples_noted", "0-39", steps=3, shard_size=8, workers=0)
    assert result.made == 24  # two shards of 8 have notes
    after = modification_times(world / "samples_noted" / "000000")
    noted = [f"{seed:06d}.png" for seed in range(16)]
    assert [after[name] for name in noted] == [before[name] for name in noted]
    assert not (world / "samples_noted" / ".work").exists()
    sample("run", "samples_noted_fresh", "16-39", steps=3, workers=0)
    for path in sorted((world / "samples_noted_fresh" / "000000").iterdir()):
        assert path.read_bytes() == (world / "samples_noted" / "000000" / path.name).read_bytes()


def test_measured_versions_are_compared_and_promoted_if_better(world: Path) -> None:
    metrics = [json.loads((world / f"pair_samples_{number}" / "metrics.json").read_text()) for number in (1, 2)]
    distances = [found["metrics"]["frechet_distance"] for found in metrics]
    assert distances[1] < distances[0]
    with environment(MLFLOW_TRACKING_URI=f"sqlite:///{world / 'store' / 'mlflow.db'}"):
        compared = json.loads(
            patchloom("models", "compare", "models:/pair/1", "models:/pair/2", "--no-picture", "--json")
        )
        assert not compared["not_comparable"]
        assert compared["metrics"][0]["frechet_distance"] == pytest.approx(distances)
        promote = ("models", "promote", "pair", "--if-better", "frechet_distance")
        patchloom(*promote, "2")  # better than the champion, version 1
        command = [sys.executable, "-m", "patchloom.pipelines.cli", *promote, "1"]
        refused = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert refused.returncode == 2, refused.stderr
        versions = json.loads(patchloom("models", "list", "--json"))
    assert [version["version"] for version in versions if "champion" in version["aliases"]] == ["2"]


@pytest.mark.slow
@pytest.mark.ray
def test_an_interrupted_search_is_finished(world: Path) -> None:
    trial = world / "search_unfinished" / "trials" / "000" / "model" / "model.safetensors"
    before = trial.stat().st_mtime_ns
    assert not (world / "search_unfinished" / "trials.jsonl").exists()
    with environment(MLFLOW_TRACKING_URI=f"sqlite:///{world / 'store' / 'mlflow.db'}"):
        patchloom("tune", "more_search.yaml", "--data", "pixels", "--out", "search_unfinished", "--restore")
    rows = [json.loads(line) for line in (world / "search_unfinished" / "trials.jsonl").read_text().splitlines()]
    assert sorted((row["name"], row["status"]) for row in rows) == [("000", "finished"), ("001", "finished")]
    assert trial.stat().st_mtime_ns == before


@pytest.mark.slow
def test_an_autoencoder_trained_again_under_its_card_has_the_same_weights(world: Path) -> None:
    shutil.copytree(world / "autoencoder", world / "autoencoder_again")
    for name in ("model", "checkpoints"):
        shutil.rmtree(world / "autoencoder_again" / name, ignore_errors=True)
    card = json.loads((world / "autoencoder_again" / "run.json").read_text())
    assert card["format_version"] == 1
    (world / "autoencoder_again" / "run.json").write_text(
        json.dumps({name: value for name, value in card.items() if name not in ("psnr_db", "ssim", "measured_images")})
    )
    settings = ["--widths", "8,16", "--images", "200", "--batch-size", "4", "--patch", "16", "--workers", "0"]
    patchloom("autoencoder", "train", "pixels", "--out", "autoencoder_again", *settings)
    weights, again = (
        load_file(world / run / "model" / "diffusion_pytorch_model.safetensors")
        for run in ("autoencoder", "autoencoder_again")
    )
    for name, values in weights.items():
        torch.testing.assert_close(again[name], values, rtol=0, atol=1e-3)
