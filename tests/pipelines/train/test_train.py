"""Training: counts, progress lines, the model folder, MLflow, and refusals."""

import contextlib
import getpass
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from helpers import assert_equal_models, start_cli, tiny_recipe, wait_until

from patchloom.errors import UserError
from patchloom.models.checkpoints import load_model
from patchloom.pipelines.train import train
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.pipelines.train.dry_run import describe_plan
from patchloom.platform.files.storage import each_json_line, read_json
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.records.run import ProgressLine, read_progress
from patchloom.platform.tracking.forwarder import line_metrics

pytestmark = pytest.mark.ray


def test_number_of_updates_follows_from_the_images(trained: Path) -> None:
    lines = list(each_json_line(trained / "progress.jsonl"))
    assert lines[-1]["step"] == round(600 / (8 * 1.9)) == 39
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    last = lines[-1]
    # an update has 8 full images, 16 crops with a quarter of the pixels, or 32 with a sixteenth
    full, rest = last["full_size_images"], last["images_seen"] - last["full_size_images"]
    assert full % 8 == 0 and rest % 16 == 0
    assert full + rest / 16 <= last["pixel_equivalent_images"] <= full + rest / 4
    assert set().union(*(line["loss_by_patch_size"] for line in lines)) == {"16", "8", "4"}


def test_rates_in_a_line_agree_with_its_counts(trained: Path) -> None:
    lines = list(each_json_line(trained / "progress.jsonl"))
    before: dict[str, Any] = {"images_seen": 0, "flops": 0, "step": 0}
    for line in lines:
        seconds = (line["images_seen"] - before["images_seen"]) / line["images_per_second"]
        assert line["flops_per_second"] * seconds == pytest.approx(line["flops"] - before["flops"])
        assert line["updates_per_second"] * seconds == pytest.approx(line["step"] - before["step"])
        if "peak_flops_per_second" in line:  # not on a machine that was busy at both measurements
            utilisation = line["flops_per_second"] / line["peak_flops_per_second"]
            assert line["model_flops_utilisation"] == pytest.approx(utilisation) and 0 < utilisation <= 1
        assert line["eta_seconds"] == pytest.approx((39 - line["step"]) / line["updates_per_second"])
        assert set(line["images_per_second_by_patch_size"]) == set(line["loss_by_patch_size"])
        assert 0 <= line["data_wait_share"] < 1 and line["straggler_loss"] == 0  # with one worker
        assert 2**26 < line["peak_memory_bytes"] < 2**36
        before = line
    assert {line.get("peak_flops_source", "measured") for line in lines} == {"measured"}


def test_model_folder_loads(trained: Path) -> None:
    denoiser = load_model(trained / "model")
    clean = denoiser(torch.zeros(2, 3, 16, 16), 0.5, labels=torch.eye(2))
    assert clean.shape == (2, 3, 16, 16) and clean.isfinite().all()
    assert read_json(trained / "model" / "model.json")["class_names"] == ["chelsea", "coffee"]


def test_mlflow_contains_lines_parameters_and_preview(trained: Path) -> None:
    lines = list(each_json_line(trained / "progress.jsonl"))
    run_id = read_json(trained / "run.json")["run_id"]
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(line["step"], line["loss"]) for line in lines]
    run = client.get_run(run_id)
    expected = line_metrics(
        ProgressLine.model_validate(last_of_each(lines))
    )  # every number, also system metrics; evaluations may add more
    assert {key: run.data.metrics[key] for key in expected} == pytest.approx(expected)
    assert {"straggler_loss", "model_flops_utilisation", "system/cpu_utilization_percentage"} <= set(run.data.metrics)
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny p=0.5 stochastic"
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    assert run.data.tags["mlflow.source.name"] == "patchloom train" and "mlflow.note.content" in run.data.tags
    assert sorted(key.partition("/")[0] for key in run.data.metrics if "/" in key)[0] == "loss"  # MLflow's first charts
    assert run.data.params["patches.p"] == "0.5"
    assert run.inputs.dataset_inputs[0].dataset.digest == read_json(trained / "run.json")["dataset_fingerprint"][:32]
    assert any("preview" in item.path for item in client.list_artifacts(run_id, "images"))


def last_of_each(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A line with the newest value of every key, also of nested keys."""
    newest: dict[str, Any] = {}
    for line in lines:
        for key, value in line.items():
            newest[key] = newest.get(key, {}) | value if isinstance(value, dict) else value
    return newest


def test_dry_run_estimates_the_counts_of_the_run(trained: Path, pixels: Path) -> None:
    plan = describe_plan(tiny_recipe(), str(pixels))
    last = read_progress(trained)[-1]
    assert plan.updates == last.updates
    assert plan.crops == pytest.approx(last.images_seen, rel=0.25)  # 39 random draws of the patch size
    assert plan.parameters == sum(p.numel() for p in load_model(trained / "model").parameters())
    large = tiny_recipe(train__batch_size=32)
    whole, parts = describe_plan(large, str(pixels)), describe_plan(large, str(pixels), microbatch=8)
    assert whole.step_bytes is not None and plan.step_bytes is not None
    assert whole.step_bytes > 3 * plan.step_bytes  # activations of 32 images instead of 8
    assert parts.step_bytes == plan.step_bytes
    small = {size.pixels: size.flops_per_crop for size in plan.sizes}
    assert small[16] / small[8] == pytest.approx(4, rel=0.1)  # the cost of convolutions is proportional to the pixels


@pytest.mark.slow
def test_workers_of_a_killed_command_stop_writing(pixels: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    tiny = tiny_recipe(train__images=3000)
    recipe.write_text(recipe_yaml(tiny))
    arguments = ["train", str(recipe), "--data", str(pixels), "--out", str(run), "--workers", "2"]
    process = start_cli(*arguments, cwd=tmp_path)
    wait_until(lambda: newest_checkpoint(run) is not None, process)
    process.kill()  # only the command; its workers become orphans
    process.wait()
    finished = start_cli(*arguments, "--resume", cwd=tmp_path)
    output, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0, output
    assert "from step" in output
    steps = [line["step"] for line in each_json_line(run / "progress.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == round(3000 / (8 * 1.9))


def test_folder_with_another_run_is_refused(trained: Path, pixels: Path) -> None:
    with pytest.raises(UserError, match="--resume"):
        train(tiny_recipe(), str(pixels), str(trained), workers=0)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        train(tiny_recipe(seed=4), str(pixels), str(trained), workers=0, resume=True)


def test_finished_run_returns_at_once(trained: Path, pixels: Path) -> None:
    before = (trained / "model" / "model.safetensors").stat().st_mtime_ns
    result = train(tiny_recipe(), str(pixels), str(trained), workers=0, resume=True)
    assert result.last["step"] == 39
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_second_process_on_a_run_is_refused(pixels: Path, tmp_path: Path) -> None:
    from patchloom.platform.files.storage import locked

    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"), pytest.raises(UserError, match=str(tmp_path / "run")):
        train(tiny_recipe(), str(pixels), str(tmp_path / "run"), workers=0)


def test_recipe_that_does_not_fit_is_refused_with_the_numbers(pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(patches__sizes=[{"fraction": 0.3125, "weight": 1, "batch_multiplier": 2}])
    with pytest.raises(UserError, match=r"patches\.sizes: .*0\.3125 .*16 .*5, .*1 "):
        train(recipe, str(pixels), str(tmp_path / "run"), workers=0)
    with pytest.raises(UserError, match="32"):
        train(tiny_recipe(model__width=144), str(pixels), str(tmp_path / "run"), workers=0)
    assert not (tmp_path / "run").exists()


def test_training_continues_when_the_store_fails(
    pixels: Path, tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
    run = tmp_path / "run"

    def damage_store(line: ProgressLine) -> None:
        for file in store.glob("mlflow.db*"):
            with contextlib.suppress(FileNotFoundError):
                file.write_bytes(b"this is not a database")

    train(tiny_recipe(), str(pixels), str(run), workers=0, show=damage_store)
    assert_equal_models(run, trained)
    assert "progress.jsonl" in capsys.readouterr().out


def test_run_and_model_contain_the_given_recipe(trained: Path) -> None:
    given = tiny_recipe().model_dump(mode="json")
    assert yaml.safe_load((trained / "recipe.yaml").read_text()) == given
    assert yaml.safe_load((trained / "model" / "recipe.yaml").read_text()) == given
