"""Remote folders, on a real S3-compatible server: runs, datasets and sources far away are what they are here."""

import json
from pathlib import Path

import pytest
from helpers import assert_equal_models, names_in, start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.pipelines.registry.comparing import compare_models
from patchloom.pipelines.registry.convert import export_model
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.report import report
from patchloom.pipelines.train import train
from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder
from patchloom.pipelines.train.checkpointer import whole_checkpoints
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import load_recipe, recipe_yaml

pytestmark = pytest.mark.ray


def test_a_remote_run_killed_and_resumed_is_the_local_run(
    s3: str, trained: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    for attempt in range(5):
        run = Folder.at(f"{s3}/runs/killed-{attempt}")
        process = start_cli(
            "train", "recipe.yaml", "--data", str(pixels), "--out", str(run), "--workers", "0", cwd=tmp_path
        )
        wait_until(lambda run=run: whole_checkpoints(run), process)
        process.kill()
        process.communicate()
        if not run.has("model/model.json"):  # else it ended before the kill
            break
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "another machine"))
    with pytest.raises(UserError, match="--resume"):
        train(recipe, str(pixels), str(run), workers=0)
    result = train(recipe, str(pixels), str(run), workers=0, resume=True)
    assert_equal_models(result.folder, trained)
    names = run.files()
    last = json.loads(run.read("progress.jsonl").splitlines()[-1])
    assert last["step"] == 39
    assert {"model/model.json", "model/model.safetensors", "recipe.yaml", "run.json", last["preview"]} <= names.keys()
    assert whole_checkpoints(run)[-1] == "checkpoints/step-00000039"
    assert len({name.split("/")[1] for name in names if name.startswith("checkpoints/")}) == 2  # by the recipe's rule
    assert not [name for name in names if "/." in f"/{name}"]
    assert train(recipe, str(pixels), str(run), workers=0, resume=True).last == last  # nothing left to do


@pytest.mark.slow
def test_a_remote_run_of_remote_data_on_workers_is_the_local_run(
    s3: str, pixels: Path, tmp_path: Path, ray_cluster: None
) -> None:
    data = Folder.at(f"{s3}/data")
    for name in Folder.at(pixels).files():
        data.put(pixels / name, name)
    recipe = tiny_recipe()
    shown: list[int] = []
    run = f"{s3}/runs/workers"
    train(recipe, str(pixels), str(tmp_path / "here"), workers=2)
    result = train(recipe, str(data), run, workers=2, show=lambda line: shown.append(line["step"]))
    assert_equal_models(result.folder, tmp_path / "here")
    assert shown == sorted(set(shown)) and shown[-1] == 39
    assert register(run, "remote").startswith("models:/remote/")
    page = report(run, str(tmp_path / "page.html")).read_text()
    assert f"--out {run}-again" in page and "-copy" not in page  # the address, not that of the copy on this machine


def test_an_address_that_cannot_be_reached_is_said_in_a_line(s3: str, pixels: Path) -> None:
    with pytest.raises(UserError, match="s3://no-such-bucket/run"):
        train(tiny_recipe(), str(pixels), "s3://no-such-bucket/run", workers=0)
    with pytest.raises(UserError, match="nosuch://"):
        train(tiny_recipe(), str(pixels), "nosuch://bucket/run", workers=0)


def test_a_remote_autoencoder_is_the_local_one(s3: str, pixels: Path, tmp_path: Path) -> None:
    settings = AutoencoderSettings(widths=(8, 8), images=64, patch=8)
    there = Folder.at(f"{s3}/autoencoder")
    near = train_autoencoder(str(pixels), str(tmp_path / "near"), settings, workers=0)
    far = train_autoencoder(str(pixels), str(there), settings, workers=0)
    names = [f"model/{name}" for name in names_in(tmp_path / "near" / "model")]
    assert "model/model.json" in names
    for name in [*names, "reconstructions.png"]:
        assert there.read(name) == (tmp_path / "near" / name).read_bytes()
    assert there.read_json("run.json")["run_id"] == far.run_id
    assert (far.psnr_db, far.ssim) == (near.psnr_db, near.ssim)
    again = train_autoencoder(str(pixels), str(there), settings, workers=0)  # finished: nothing is trained again
    assert again.run_id == far.run_id


def test_models_pages_and_recipes_can_be_remote(s3: str, trained: Path, tmp_path: Path) -> None:
    there = Folder.at(f"{s3}/exported")
    here = export_model(str(trained), str(there))
    for name in names_in(trained / "model"):
        assert there.read(name) == (trained / "model" / name).read_bytes() == (here / name).read_bytes()
    with pytest.raises(UserError, match="not empty"):
        export_model(str(trained), str(there))
    (here / "of-another-model.txt").write_text("")
    for name in there.files():
        there.remove(name)
    export_model(str(trained), str(there))
    assert not there.has("of-another-model.txt")
    page = report(str(trained), f"{s3}/pages/run.html")
    assert Folder.at(f"{s3}/pages").read("run.html") == page.read_bytes()
    assert load_recipe(f"{there}/recipe.yaml", ["patches.p=0.25"]).patches.p == 0.25
    for base in ("recipe.yaml", f"{there}/recipe.yaml"):
        there.write("variant.yaml", f"base: {base}\nname: variant\nseed: 77\n".encode())
        assert load_recipe(f"{there}/variant.yaml") == load_recipe(f"{there}/recipe.yaml", ["name=variant", "seed=77"])
    there.write("variant.yaml", b"base: ../recipe.yaml\nname: variant\n")
    with pytest.raises(UserError, match=r"\.\./recipe\.yaml"):
        load_recipe(f"{there}/variant.yaml")
    with pytest.raises(UserError, match="no-file does not exist"):
        load_recipe(f"{there}/no-file")
    with pytest.raises(UserError, match="local path"):
        compare_models("no-such-model", "nor-this", picture=f"{s3}/picture.png")
