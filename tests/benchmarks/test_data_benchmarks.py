"""Benchmarks of data, sampling, commands and searches: names, units and counts; no test checks a timing."""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from patchloom.benchmarks import preparing, reading, sampling, searching, startup
from patchloom.benchmarks.findings import TINY, Finding, Say, Scale
from patchloom.benchmarks.plain import plain_heun
from patchloom.benchmarks.setups import same_networks, sampling_flops, song_config
from patchloom.models.generate import Sampling, generate
from patchloom.models.samplers import SeededNoise
from patchloom.pipelines.prepare.shard_maker import ShardMakerArgument
from patchloom.pipelines.tune.planning import images_for, plan_trials, trial_flops
from patchloom.platform.dataset import open_dataset
from patchloom.platform.recipe import load_recipe
from patchloom.platform.recipe.search import load_search

BenchmarkFunction = Callable[[Scale, Say], list[Finding]]


def measured(function: BenchmarkFunction) -> dict[str, Finding]:
    """Findings by name. Checks that names are unique, spreads are ordered and limits are explained."""
    progress: list[str] = []
    findings = function(TINY, progress.append)
    assert progress[-1] in ("round 1 of 1", "round 2 of 2")
    for found in findings:
        spread = found.measured
        assert 0 < spread.low <= spread.median <= spread.high < float("inf"), found
        assert found.limit is None or (found.limit > 0 and found.limit_is), found
        assert (found.is_met is None) == (found.wanted is None), found
    named = {found.what.strip(): found for found in findings}
    assert len(named) == len(findings)
    return named


def targets(found: dict[str, Finding]) -> list[tuple[float, bool]]:
    """Targets, and whether each is a maximum."""
    return [(one.wanted, one.is_cost) for one in found.values() if one.wanted is not None]


def units(found: dict[str, Finding]) -> list[str]:
    return [one.unit for one in found.values()]


# -- sampling


@pytest.mark.parametrize(("side", "steps"), [(16, 5), (32, 3)])
def test_plain_heun_and_generate_make_the_same_images_from_the_same_noise(side: int, steps: int) -> None:
    model, plain = same_networks(song_config(side, 8, 1, dropout=0.0))
    seeds = [3, 5, 8]
    start = SeededNoise(seeds, (3, side, side))()
    fresh = generate(model, seeds, [-1] * 3, Sampling(steps=steps))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.denoiser.parameters():  # initial weights have almost no effect
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    plain.load_state_dict(dict(model.denoiser.named_parameters()))
    ours, expected = generate(model, seeds, [-1] * 3, Sampling(steps=steps)), plain_heun(plain, start, steps)
    assert (ours.int() - expected.int()).abs().max() <= 1
    assert (ours.int() - fresh.int()).abs().float().mean() > 1  # the network has an effect
    assert (ours[0].int() - ours[1].int()).abs().float().mean() > 1  # and so has the noise


def test_flops_of_sampling_count_all_evaluations() -> None:
    config = song_config(16, 8, 1, dropout=0.0)
    _, plain = same_networks(config)
    with FlopCounterMode(display=False) as counter:  # it does not count torch's fused attention on a CPU
        plain_heun(plain, torch.randn(1, 3, 16, 16), sampling.SAMPLING.steps)
    assert sampling_flops(config, sampling.SAMPLING) == counter.get_total_flops()


def test_sampling_compared_with_a_plain_loop() -> None:
    found = measured(sampling.against_plain)
    name = "sampling, 5 steps of Heun, width 8, R = 16"
    assert list(found) == [
        f"{name}: over a plain loop", f"{name}: over a plain loop, CPU time", name, f"{name}, plain loop",
        "FLOP rate as a share of the GEMM rate",
    ]  # fmt: skip
    assert units(found) == ["x", "x", "images/s", "images/s", "%"]
    assert targets(found) == [(1.0, False)]
    ours, limit = found[name], found[name].limit
    assert limit is not None and limit == found[f"{name}, plain loop"].limit
    assert found["FLOP rate as a share of the GEMM rate"].measured.median == pytest.approx(
        100 * ours.measured.median / limit
    )


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_of_sample_compared_with_plain_loops(ray_cluster: None) -> None:
    found = measured(sampling.ray_data_worker)
    assert units(found) == ["x"] * 4 + ["images/s"] * 3
    assert targets(found) == []
    assert [one.limit for one in found.values()][:4] == [1.0] * 4


def test_the_plain_loop_saves_every_image(tmp_path: Path) -> None:
    model, _ = same_networks(song_config(16, 8, 1, dropout=0.0))
    assert sampling.plain_loop(model, 32, tmp_path / "saved") == 32
    assert len(list((tmp_path / "saved").glob("*.png"))) == 32


# -- preparing and reading


@pytest.mark.slow
@pytest.mark.ray
def test_prepare_compared_with_a_pillow_loop(ray_cluster: None) -> None:
    found = measured(preparing.against_pillow)
    assert units(found) == ["x"] * 6 + ["images/s"] * 2
    assert targets(found) == [(0.8, False)]
    assert found["a worker on Ray over a Pillow loop, CPU time"].wanted == 0.8
    assert "the whole call, 48 images, elapsed time" in found


def test_prepare_and_the_pillow_loop_read_all_images(tmp_path: Path) -> None:
    archive = preparing.make_archive(tmp_path / "source.zip", 10)
    copies = preparing.repeat_archive(archive, tmp_path / "copies.zip")
    assert (preparing.pillow_loop(archive), preparing.pillow_loop(copies)) == (10, 40)
    planned = preparing.TimedPreparation(copies, tmp_path / "planned", shard_rows=16)
    planned.start()
    units = planned.missing()
    maker = preparing.TimedShardMaker(ShardMakerArgument(planned.folder.address))
    loop = preparing.PillowLoop((str(copies), 16))
    for worker in (maker, loop):
        made = [worker(shard, preparing.ignore) for shard in units]
        assert [shard.images for shard in made] == [16, 16, 8]
        assert [shard.is_first for shard in made] == [True, False, False]


def test_a_rate_excludes_the_first_shard_of_each_worker() -> None:
    first, later = preparing.TimedShard(10, 5.0, is_first=True), preparing.TimedShard(10, 0.5, is_first=False)
    assert preparing.warm_rate([first, later, first, later]) == 20
    assert preparing.warm_rate([first]) == 2


def test_random_rows_of_latents() -> None:
    found = measured(reading.random_rows)
    assert units(found) == ["latents/s", "x", "%", "bytes"]
    assert targets(found) == [(20_000, False)]
    rate, limit = next(iter(found.values())).measured.median, next(iter(found.values())).limit
    assert limit is not None
    assert found["share of the limit"].measured.median == pytest.approx(100 * rate / limit)
    assert found["bytes per latent"].measured.median == 2 * 2 * 4 * 32 * 32 + 4  # two float16 tensors and a label


def test_dataset_and_numpy_read_the_same_rows(tmp_path: Path) -> None:
    dataset, columns = reading.latents_on_disk(tmp_path / "dataset", 2), reading.mapped_columns(tmp_path, 2)
    indices = np.array([1000, 0, 511, 512, 3])
    rows = dataset.rows(indices)
    assert all(np.array_equal(rows[name], column[indices]) for name, column in columns.items())
    assert len(dataset) == len(columns["mean"]) == 1024


# -- commands and searches


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> startup.Workspace:
    return startup.Workspace.create(tmp_path_factory.mktemp("workspace"), TINY)


def test_a_workspace_has_a_dataset_and_a_matching_recipe(workspace: startup.Workspace) -> None:
    recipe = startup.small_recipe(TINY)
    assert load_recipe(workspace.write_recipe("one", recipe)) == recipe
    dataset = open_dataset(workspace.dataset)
    assert len(dataset) == startup.IMAGES and dataset.card["resolution"] == TINY.side
    assert len(dataset.indices("held_out", recipe.data.held_out_fraction)) > 0
    assert recipe.train.log_every_images == recipe.train.batch_size  # a line after every step


def test_the_error_of_a_failed_command_contains_its_output(workspace: startup.Workspace) -> None:
    assert workspace.run(sys.executable, "-c", "pass") == 1
    with pytest.raises(RuntimeError, match="3: what went wrong"):
        workspace.run(sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"2: patchloom: .*nowhere"):
        workspace.run(*startup.patchloom("train", "nowhere", "--data", workspace.dataset, "--dry-run"))


def test_a_running_command_ends_with_the_block(workspace: startup.Workspace) -> None:
    start = time.monotonic()
    with workspace.running(sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(100)") as process:
        startup.wait_for(lambda: True, process)
    assert process.poll() is not None and time.monotonic() - start < 60
    with workspace.running(sys.executable, "-c", "pass") as process:
        startup.wait_for(lambda: False, process)  # returns because the process has ended


def test_a_file_is_not_empty_after_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    assert not startup.is_not_empty(path)
    path.touch()
    assert not startup.is_not_empty(path)
    path.write_text("{}\n")
    assert startup.is_not_empty(path)


@pytest.mark.slow
def test_startup_of_commands() -> None:
    found = measured(startup.commands)
    assert units(found) == ["s"] * 5 and all(one.is_cost for one in found.values())
    assert targets(found) == [(0.5, True), (5.0, True), (10.0, True)]
    assert found["patchloom --help"].limit == found["python -c pass"].measured.median
    assert found["patchloom train --dry-run"].limit == found['python -c "import torch"'].measured.median


def test_single_trials_are_those_of_the_search(workspace: startup.Workspace) -> None:
    scale = replace(TINY, seconds=20.0)
    search = searching.write_search(workspace, scale)
    recipes = [load_recipe(path) for path in searching.write_trials(workspace, search)]
    assert [recipe.patches.p for recipe in recipes] == searching.GRID
    dataset = open_dataset(workspace.dataset)
    definition, base = load_search(search)
    assert recipes == [trial.recipe for trial in plan_trials(definition, base, dataset)]
    assert [recipe.train.images for recipe in recipes] == [
        images_for(definition.budget, recipe, dataset) for recipe in recipes
    ]
    for recipe in recipes:
        assert trial_flops(recipe, dataset) == pytest.approx(searching.trial_flops(scale), rel=0.02)


@pytest.mark.slow
@pytest.mark.ray
def test_a_search_compared_with_its_trials() -> None:
    found = measured(searching.against_trials)
    assert units(found) == ["x", "s", "s", "s", "GFLOP"]
    assert targets(found) == []
    ratio, search, first, alone, _ = (one.measured.median for one in found.values())
    assert ratio == pytest.approx(search / alone)
    assert first < search
