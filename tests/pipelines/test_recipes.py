"""Recipes of the paper: sizes and costs that others published, and texts that state them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from patchloom.errors import UserError
from patchloom.models.denoiser import skeleton
from patchloom.models.flops import parameter_count
from patchloom.pipelines.recipes import (
    PAPER,
    PIXELS_64,
    TWO_CORES_RATE,
    PaperSystem,
    counted,
    paper_table,
    recipe_costs,
    shape_of_recipe,
    shipped_recipes,
    small_table,
    small_twin,
)
from patchloom.pipelines.train.data_shape import DataShape
from patchloom.pipelines.train.dry_run import describe_plan, gpu_hours
from patchloom.pipelines.train.model_card import new_denoiser_config
from patchloom.pipelines.train.resuming import differing_keys
from patchloom.platform.recipe import Recipe, load_recipe, with_values
from patchloom.platform.recipe.files import SHIPPED

SYSTEMS = {system.recipe: system for system in PAPER}
DDPMPP = [name for name in SYSTEMS if name.startswith(("celeba64", "ffhq64", "afhq64"))]
LATENT_ADM = [name for name in SYSTEMS if name.startswith(("lsun", "imagenet256"))]
by_system = pytest.mark.parametrize("system", PAPER, ids=list(SYSTEMS))


def counts_of(name: str) -> dict[int, float]:
    """GFLOP of training on a crop, by side."""
    counts = counted(load_recipe(name), SYSTEMS[name].shape)
    return {size.pixels: size.flops_per_crop / 1e9 for size in counts.sizes}


def parameters_of(recipe: Recipe, shape: DataShape) -> int:
    return parameter_count(skeleton(new_denoiser_config(recipe, shape)))


@pytest.mark.parametrize("name", DDPMPP)
def test_ddpmpp_has_the_size_of_an_independent_count(name: str) -> None:
    assert round(parameters_of(load_recipe(name), PIXELS_64) / 1e6, 1) == 61.8  # no paper states it
    expected = {64: 251.2} if name.endswith("_edm") else {64: 251.2, 32: 62.6, 16: 15.7}
    assert counts_of(name) == {side: pytest.approx(flops, abs=0.06) for side, flops in expected.items()}


@pytest.mark.parametrize("name", LATENT_ADM)
def test_adm_on_latents_has_the_cost_of_an_independent_count(name: str) -> None:
    # no paper states these numbers
    expected = {32: 179.3} if name.endswith("_ldm") else {32: 179.3, 16: 41.3, 8: 10.2}
    assert counts_of(name) == {side: pytest.approx(flops, abs=0.06) for side, flops in expected.items()}
    unconditional = with_values(load_recipe(name), {"model.class_conditional": False})
    assert round(parameters_of(unconditional, SYSTEMS[name].shape) / 1e6, 1) == 279.6


def test_adm_at_64_pixels_has_the_published_size() -> None:
    """296 M: ADM for ImageNet-64 (Dhariwal & Nichol 2021, Table 11), which EDM takes over."""
    recipe = with_values(load_recipe("imagenet256_ldm"), {"model.coordinates": "none"})
    assert round(parameters_of(recipe, replace(PIXELS_64, classes=1000)) / 1e6) == 296


def test_adm_in_pixels_has_the_published_size_and_cost() -> None:
    """554 M (Dhariwal & Nichol 2021, Table 11), 1120 G multiply-adds (Patch Diffusion, Table 3)."""
    counts = counted(load_recipe("adm256"), SYSTEMS["adm256"].shape)
    assert round(counts.parameters / 1e6) == 554
    assert counts.evaluation_flops / 2e9 == pytest.approx(1120, rel=0.001)
    assert counts.updates == 1_980_000


def test_controlnets_have_the_sizes_of_an_independent_count() -> None:
    """361 M and 860 M: ControlNet and UNet of Stable Diffusion 1.5 as published. FLOPs: docs/LOG.md."""
    recipe, shape = load_recipe("controlnet"), SYSTEMS["controlnet"].shape
    network = skeleton(new_denoiser_config(recipe, shape))
    frozen = network.model.frozen  # type: ignore[union-attr]
    assert round(sum(one.numel() for one in frozen.parameters()) / 1e6, 1) == 859.5  # type: ignore[operator]
    assert round(parameters_of(recipe, shape) / 1e6, 1) == 361.3
    assert counts_of("controlnet") == {64: pytest.approx(2265, abs=1), 32: pytest.approx(492.6, abs=0.2),
                                       16: pytest.approx(122.6, abs=0.1)}  # fmt: skip
    counts = [counted(load_recipe(name), SYSTEMS[name].shape) for name in ("controlnet", "controlnet_full")]
    assert [count.updates for count in counts] == [20_000, 20_000]
    assert counts[0].evaluation_flops == pytest.approx(1087e9, rel=1e-3)
    assert counts[1].flops / counts[0].flops == pytest.approx(1.48, abs=0.01)


def test_a_plan_without_data_needs_no_files_of_a_known_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_BASE_MODEL", "/nowhere")
    recipe, shape = load_recipe("controlnet_small"), DataShape.parse("16x16x4", conditions=3, kind="latents")
    assert "5,000 updates" in describe_plan(recipe, shape, microbatch=4).text
    with pytest.raises(UserError, match="--measure"):
        describe_plan(recipe, shape, measure=True)
    with pytest.raises(UserError, match="--like-condition"):
        describe_plan(recipe, replace(shape, condition_channels=0))
    with pytest.raises(UserError, match="/nowhere"):
        describe_plan(with_values(recipe, {"model.base": "./another"}), shape)


def test_length_and_cost_follow_from_the_paper() -> None:
    counts = {name: counted(load_recipe(name), system.shape) for name, system in SYSTEMS.items()}
    assert gpu_hours(counts["celeba64_edm"].flops) == pytest.approx(200e6 * 251.17e9 / 1e14 / 3600, rel=1e-4)
    for name in ("celeba64", "ffhq64", "afhq64_cat", "afhq64_dog", "afhq64_wild"):  # 2.72 at p = .5 and R = 64
        assert counts[f"{name}_edm"].flops / counts[name].flops == pytest.approx(2.72, abs=0.01)
    assert counts["celeba64"].updates == round(200e6 / 512 / 1.9)
    assert counts["afhq64_wild_edm"].updates == round(75e6 / 512)
    assert counts["lsun_church256_ldm"].updates == round(200e6 / 1024)
    assert counts["imagenet256"].updates == round(2500e6 / 4096 / 1.9)


@pytest.mark.parametrize("name", ["celeba64_edm", "lsun_church256_ldm", "imagenet256", "adm256"])
def test_dry_run_prints_the_size_and_costs(name: str) -> None:
    """Also the memory, for a worker that trains on 8 crops at a time; one recipe of each network."""
    recipe, system = load_recipe(name), SYSTEMS[name]
    counts, text = counted(recipe, system.shape), describe_plan(recipe, system.shape, microbatch=8).text
    assert f"{counts.parameters:,} parameters" in text and f"{counts.updates:,} updates" in text
    assert f"{counts.evaluation_flops / 1e9:,.4g} GFLOP" in text


@by_system
def test_a_file_states_its_cost_and_the_papers_fid(system: PaperSystem) -> None:
    counts = counted(load_recipe(system.recipe), system.shape)
    said = comment_of(system.recipe)
    assert f"{gpu_hours(counts.flops):,.1f} GPU-hours at 100 TFLOP/s" in said
    assert all(fid in said for fid in re.findall(r"\d+\.\d\d", system.fid))
    twin = load_recipe(small_twin(system.recipe))
    minutes = counted(twin, shape_of_recipe(twin)).flops / TWO_CORES_RATE / 60
    assert f"{minutes:.0f} minutes on 2 CPU cores" in comment_of(small_twin(system.recipe))
    assert minutes < 90


def comment_of(name: str) -> str:
    """The comment at the top of a shipped file."""
    lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
    return " ".join(line for line in lines if line.startswith("#"))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name.endswith(("_edm", "_ldm"))])
def test_small_twins_make_the_same_comparison(name: str) -> None:
    system = name.rpartition("_")[0]
    full, small = ([load_recipe(one) for one in pair] for pair in ((system, name), map(small_twin, (system, name))))
    compared, in_small = differing_keys(*full), differing_keys(*small)
    assert compared.pop("name") != in_small.pop("name")
    assert compared == in_small and compared["patches.p"] == (0.5, 1.0)


def test_documentation_has_the_counted_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for table in (paper_table(), small_table()):
        assert table in page, f"docs/recipes.md: python -m patchloom.pipelines.recipes prints its tables:\n{table}"


def test_every_shipped_file_is_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from patchloom.pipelines.cli import main

    monkeypatch.setattr("sys.argv", ["patchloom", "recipes", "--json"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    listed = json.loads(capsys.readouterr().out)
    assert sorted(one["name"] for one in listed) == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert listed == [one.to_json() for one in shipped_recipes()]
    costs = {one["name"]: one["cost"] for one in listed}
    assert costs["celeba64"] == "51.4 GPU-hours" and costs["loss_search_cpu"] == "8 trials of 1 TFLOP"


def test_stated_costs_are_those_of_the_recipes() -> None:
    """After a change of a recipe: make schema."""
    assert (SHIPPED / "recipe_costs.json").read_text() == recipe_costs()
