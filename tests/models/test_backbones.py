"""A network from outside is not even imported before it is allowed, and then trains, is kept and is counted as ours."""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from patchloom.models.backbones import ALLOWED, allow_backbones, allowed_backbones, build_backbone
from patchloom.models.cards import DenoiserConfig, ModelCard
from patchloom.models.checkpoints import CheckpointError, load_model, save_model
from patchloom.models.denoiser import Denoiser, build_denoiser, halvings_of
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.flops import training_flops
from patchloom.models.loss import held_out_loss
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import coordinate_grid, patch_schedule
from patchloom.models.step import StoredRows, TrainingState, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

PACKAGE = "somebodys_network"
ADAPTER = """
import torch
from diffusers import UNet2DModel


class Adapter(torch.nn.Module):
    def __init__(self, resolution, channels_in, channels_out, classes, **options):
        super().__init__()
        self.network = UNet2DModel(resolution, channels_in, channels_out, **options)

    def forward(self, x, noise_condition, labels):
        return self.network(x, noise_condition).sample
"""
OTHERS = """
import torch

from somebodys_network import Adapter


class Narrow(torch.nn.Module):
    def __init__(self, resolution):
        super().__init__()


def no_network(**options):
    return dict(options)


class Conditional(torch.nn.Module):
    def __init__(self, resolution, channels_in, channels_out, classes):
        super().__init__()
        self.kept = (resolution, channels_in, channels_out, classes)
        self.layer = torch.nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.table = torch.nn.Linear(classes, channels_out)

    def forward(self, x, noise_condition, labels):
        scale = noise_condition.exp()[:, None, None, None]
        return scale * self.layer(x) + self.table(labels)[:, :, None, None]
"""
OPTIONS: dict[str, Any] = {
    "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
ARGUMENTS: dict[str, Any] = {"resolution": 16, "channels_in": 5, "channels_out": 3, "classes": 0}


@pytest.fixture(autouse=True)
def somebodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that is found, is not allowed and was never imported; nothing of it stays behind."""
    folder = tmp_path / "elsewhere" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(ADAPTER)
    (folder / "others.py").write_text(OTHERS)
    (folder / "broken.py").write_text("import a_module_that_is_nowhere\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv(ALLOWED, "")
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, PACKAGE)


@pytest.fixture
def config(tiny_config: Callable[..., DenoiserConfig]) -> DenoiserConfig:
    return tiny_config(network=f"{PACKAGE}:Adapter", network_options=OPTIONS)


def build(config: DenoiserConfig) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_denoiser(config)


# Permission


def test_the_permission_is_read_from_this_variable() -> None:
    assert ALLOWED == "PATCHLOOM_ALLOW_BACKBONE"


@pytest.mark.parametrize("others", [None, "", "diffusers", f"{PACKAGE}_2,my_{PACKAGE}", f"{PACKAGE}.others"])
def test_a_network_that_was_not_allowed_is_refused_and_not_imported(
    config: DenoiserConfig, monkeypatch: pytest.MonkeyPatch, others: str | None
) -> None:
    if others is None:
        monkeypatch.delenv(ALLOWED)
    else:
        monkeypatch.setenv(ALLOWED, others)
    with pytest.raises(ValueError, match=f"--allow-backbone {PACKAGE}$"):
        build_denoiser(config)
    for ask in (halvings_of, lambda asked: training_flops(asked, 16)):
        with pytest.raises(ValueError, match=f"--allow-backbone {PACKAGE}$"):
            ask(config)
    assert PACKAGE not in sys.modules


def test_a_module_deep_in_a_package_needs_the_packages_permission(
    config: DenoiserConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, network=f"{PACKAGE}.others:Adapter")
    with pytest.raises(ValueError, match=f"--allow-backbone {PACKAGE}$"):
        build_denoiser(config)
    assert not [name for name in sys.modules if name.startswith(PACKAGE)]
    monkeypatch.setenv(ALLOWED, f"diffusers,{PACKAGE}")
    assert build_denoiser(config).resolution == 16


def test_permissions_add_up_and_reach_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ALLOWED)
    assert allowed_backbones() == ()
    allow_backbones("one")
    allow_backbones("two", "one")
    allow_backbones()
    assert allowed_backbones() == ("one", "two")
    monkeypatch.setenv(ALLOWED, "three")
    assert allowed_backbones() == ("three",)


# Mistakes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{PACKAGE}.nowhere:Adapter", rf"{PACKAGE}\.nowhere:Adapter.*PYTHONPATH"),
        (f"{PACKAGE}.broken:Adapter", "a_module_that_is_nowhere"),
        (f"{PACKAGE}:Missing", f"{PACKAGE}.*Missing"),
        (f"{PACKAGE}.others:no_network", "dict.*torch.nn.Module"),
        (f"{PACKAGE}.others:Narrow", "resolution, channels_in, channels_out, classes"),
    ],
)
@pytest.mark.usefixtures("allowed")
def test_a_network_that_cannot_be_imported_or_built_is_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_backbone(name, ARGUMENTS)


def test_a_package_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOWED, "a_module_that_is_nowhere")
    with pytest.raises(ValueError, match=r"a_module_that_is_nowhere"):
        build_backbone("a_module_that_is_nowhere:Network", ARGUMENTS)


@pytest.mark.usefixtures("allowed")
def test_an_unknown_network_option_is_refused(config: DenoiserConfig) -> None:
    with pytest.raises(ValueError, match="colour"):
        build_denoiser(replace(config, network_options={**OPTIONS, "colour": 1}))


# Building and running


@pytest.mark.parametrize(("coordinates", "channels"), [("linear", 5), ("periodic", 27), ("none", 3)])
@pytest.mark.usefixtures("allowed")
@torch.no_grad()
def test_a_network_is_built_for_the_image_and_its_coordinates(
    config: DenoiserConfig, coordinates: str, channels: int
) -> None:
    denoiser = build(replace(config, coordinates=coordinates)).eval()
    assert type(denoiser.model).__module__ == PACKAGE
    assert denoiser.model.get_parameter("network.conv_in.weight").shape[1] == channels
    for size in (16, 8):
        assert denoiser(torch.randn(2, 3, size, size), 0.5).shape == (2, 3, size, size)


@pytest.mark.usefixtures("allowed")
@torch.no_grad()
def test_a_network_is_given_labels_and_the_noise_condition(config: DenoiserConfig) -> None:
    denoiser = build(replace(config, network=f"{PACKAGE}.others:Conditional", network_options={}, classes=4))
    assert denoiser.model.kept == (16, 5, 3, 4)
    x, labels = torch.randn(2, 3, 8, 8), torch.eye(4)[:2]
    grid = coordinate_grid(8, 8)[None].expand(2, -1, -1, -1)
    sigma = torch.tensor([0.5, 2.0])
    spread = sigma[:, None, None, None]
    total = (spread**2 + 0.25).sqrt()  # EDM, Table 1
    raw = denoiser.model(torch.cat([x / total, grid], dim=1), sigma.log() / 4, labels)
    wanted = 0.25 / total**2 * x + 0.5 * spread / total * raw
    torch.testing.assert_close(denoiser(x, sigma, grid, labels), wanted)
    torch.testing.assert_close(denoiser(x, sigma), denoiser(x, sigma, grid, torch.zeros(2, 4)))


@pytest.mark.usefixtures("allowed")
def test_a_backbone_has_no_halvings(config: DenoiserConfig) -> None:
    assert halvings_of(config) == 0


@pytest.mark.usefixtures("allowed")
def test_its_flops_are_counted_and_grow_with_the_patch(config: DenoiserConfig) -> None:
    small, large = training_flops(config, 8), training_flops(config, 16)
    assert 0 < 3 * small < large < 6 * small  # four times the pixels, and attention
    denoiser = build(config)
    weights = denoiser.model.get_parameter("network.conv_in.weight").numel()
    assert large > 3 * 2 * 16 * 16 * weights  # more than its first convolution


# Training


def state_of(config: DenoiserConfig, method: StepSettings) -> TrainingState:
    denoiser = build(config).train()
    return new_state(denoiser, [HalfLifeEMA(denoiser, 16)], method, (0.9, 0.999), 1e-8)


def step_settings(**changes: Any) -> StepSettings:
    values = {"seed": 2, "schedule": patch_schedule(16, 0.5, smaller=((0.5, 1.0, 2),)), "updates": 30,
              "batch_size": 8, "block_size": 4, "lr": 3e-3, "lr_rampup_images": 0}  # fmt: skip
    return StepSettings(**{**values, **changes})


def image_rows() -> StoredRows:
    """Sixteen images of one slope each."""
    slopes = torch.linspace(-1, 1, 16)[:, None, None, None]
    images = 127.5 * (1 + slopes * coordinate_grid(16, 16)[:1]).expand(-1, 3, -1, -1)
    return StoredRows(images.to(torch.uint8), torch.full((16,), -1))


def train(state: TrainingState, method: StepSettings, steps: int) -> None:
    rows = image_rows()
    for _ in range(steps):
        plan = plan_step(method, state.step, state.images_seen)
        parts = [
            StoredRows(rows.image[[crop % 16 for crop in group.crops]], rows.label[: len(group.crops)])
            for group in plan.share(0, 1)
        ]
        training_step(state, method, plan, zip(plan.share(), parts, strict=True), pixel_normalisation(), None)


@pytest.mark.parametrize("draw", ["shared", "stratified"])
@pytest.mark.usefixtures("allowed")
def test_a_network_from_outside_learns_on_patches(config: DenoiserConfig, draw: str) -> None:
    method = step_settings(draw=draw)
    state = state_of(config, method)
    images = pixel_normalisation().normalise(image_rows().image.float())
    before = held_out_loss(copy.deepcopy(state.denoiser).eval(), images, None)
    train(state, method, 25)
    after = held_out_loss(state.denoiser.eval(), images, None)
    assert all(crops > 0 for crops in state.crops_by_size)
    assert sum(after.values()) < 0.8 * sum(before.values())
    average = held_out_loss(state.emas[0].module, images, None)  # type: ignore[arg-type]
    assert sum(average.values()) < sum(before.values())


@pytest.mark.usefixtures("allowed")
def test_backbone_dropout_is_repeatable_and_restores_the_global_generator(config: DenoiserConfig) -> None:
    config = replace(config, network_options={**OPTIONS, "dropout": 0.5})
    method = step_settings()
    found = []
    for number in range(2):
        state = state_of(config, method)
        torch.manual_seed(number)
        before = torch.get_rng_state()
        train(state, method, 1)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(state.gradients.flat)
    assert torch.equal(found[0], found[1])
    plain = state_of(replace(config, network_options=OPTIONS), method)
    train(plain, method, 1)
    assert not torch.allclose(plain.gradients.flat, found[0])  # dropout was at work


# Keeping


@pytest.mark.usefixtures("allowed")
def test_a_trained_network_from_outside_comes_back_bit_for_bit(config: DenoiserConfig, tmp_path: Path) -> None:
    state = state_of(config, step_settings())
    train(state, step_settings(), 2)
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, state.denoiser, ModelCard(denoiser=config, normalisation=pixel_normalisation()))
    loaded = load_model(folder)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x, 0.3), state.denoiser.eval()(x, 0.3))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.usefixtures("allowed")
def test_a_model_folder_cannot_bring_its_own_permission(
    config: DenoiserConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    card = ModelCard(denoiser=config, normalisation=pixel_normalisation(), other={"allow_backbone": PACKAGE})
    save_model(folder, build(config), card)
    del sys.modules[PACKAGE]
    monkeypatch.setenv(ALLOWED, "")
    with pytest.raises(CheckpointError, match=f"{folder}: .*--allow-backbone {PACKAGE}$"):
        load_model(folder)
    assert PACKAGE not in sys.modules
