"""ControlNets: the denoiser is that of diffusers in other variables, and only the ControlNet is trained."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from tiny_base import TOKENS, WIDTH, save_tiny_base
from torch import Tensor, nn

from patchloom.models.cards import DenoiserConfig
from patchloom.models.conditions import depth_to_space
from patchloom.models.controlnet import BASE_FOLDER, ControlNetwork, describe_base
from patchloom.models.denoiser import Denoiser, build_denoiser, halvings_of, skeleton
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.loss import denoising_loss
from patchloom.models.patches import coordinate_grid

R, F = 8, 2  # side of a latent, and pixels of an image per latent pixel


def config_of(base: Path, coordinates: str = "linear", **changes: Any) -> DenoiserConfig:
    options = {**describe_base(str(base)), "control_channels": 1, "downscale": F, "tokens": TOKENS}
    config = DenoiserConfig(network="controlnet", network_options=options, resolution=R, channels=4, classes=0,
                            coordinates=coordinates, condition_channels=F * F, sigma_data=1.0)  # fmt: skip
    return replace(config, **changes)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"), prediction=request.param)


def network_of(denoiser: Denoiser) -> ControlNetwork:
    assert isinstance(denoiser.model, ControlNetwork)
    return denoiser.model


def awake(denoiser: Denoiser) -> Denoiser:
    """With weights that are not zero where new ones are."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in denoiser.parameters():
            nn.init.normal_(parameter, 0.0, 0.1)
    network_of(denoiser).no_text.fill_(0.5)
    return denoiser.eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_denoiser_is_the_prediction_of_diffusers_with_the_same_residuals(base: Path) -> None:
    denoiser = awake(build_denoiser(config_of(base)))
    unet = UNet2DConditionModel.from_pretrained(base / "unet", low_cpu_mem_usage=False).eval()
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
    control, text, clean, eps = noise(3, F * F, R, R), noise(3, TOKENS, WIDTH), noise(3, 4, R, R), noise(3, 4, R, R)
    steps = torch.tensor([1, 500, 998])
    kept = scheduler.alphas_cumprod[steps][:, None, None, None]
    diffused = scheduler.add_noise(clean, eps, steps)  # in the variables of DDPM
    noisy, sigma = diffused / kept.sqrt(), ((1 - kept) / kept).sqrt().flatten()

    image = torch.cat([depth_to_space(control, F) / 2 + 0.5, torch.empty(3, 2, 2 * R, 2 * R)], dim=1)
    image[:, 1:] = coordinate_grid(R, R).repeat_interleave(F, 1).repeat_interleave(F, 2)
    down, middle = network_of(denoiser).controlnet(diffused, steps, text, image, return_dict=False)
    (found,) = unet(diffused, steps, text, down_block_additional_residuals=down,
                    mid_block_additional_residual=middle, return_dict=False)  # fmt: skip
    estimate = denoiser(noisy, sigma, None, text, control)
    if scheduler.config.prediction_type == "epsilon":
        predicted = (diffused - kept.sqrt() * estimate) / (1 - kept).sqrt()
    else:
        predicted = (kept.sqrt() * diffused - estimate) / (1 - kept).sqrt()
    torch.testing.assert_close(predicted, found, atol=1e-5, rtol=1e-5)


def test_time_steps_are_those_of_the_noise_levels(base: Path) -> None:
    network = network_of(build_denoiser(config_of(base)))
    kept = DDPMScheduler.from_pretrained(base / "scheduler").alphas_cumprod.double()
    sigmas = ((1 - kept) / kept).sqrt()
    torch.testing.assert_close(network.time_steps(sigmas.float()), torch.arange(1000.0), atol=1e-2, rtol=0)
    between = network.time_steps((sigmas[1:] * sigmas[:-1]).sqrt().float())
    torch.testing.assert_close(between, torch.arange(999) + 0.5, atol=1e-2, rtol=0)
    assert network.time_steps(torch.tensor([1e-3, 80.0])).tolist() == [0, 999]
    low, high = network.sigma_range
    assert low == pytest.approx(float(sigmas[0])) and high == pytest.approx(float(sigmas[-1]))


def test_training_draws_every_time_step_equally_often(base: Path) -> None:
    network = network_of(build_denoiser(config_of(base)))
    steps = network.time_steps(network.training_levels(noise(200_000))).round().long()
    counts = torch.bincount(steps // 100, minlength=10)
    assert (counts - 20_000).abs().max() < 600  # 4.5 standard deviations


@torch.no_grad()
def test_a_new_controlnet_leaves_the_prediction_of_the_base(base: Path) -> None:
    denoiser = build_denoiser(config_of(base)).eval()
    x, text = noise(2, 4, R, R), noise(2, TOKENS, WIDTH)
    controlled = denoiser(x, 0.7, None, text, noise(2, F * F, R, R))
    scale = 1 / (1 + 0.7**2) ** 0.5
    time = network_of(denoiser).time_steps(torch.tensor([0.7]))
    predicted = network_of(denoiser).frozen(scale * x, time, text).sample
    is_noise = network_of(denoiser).prediction == "epsilon"
    wanted = x - 0.7 * predicted if is_noise else scale**2 * x - 0.7 * scale * predicted
    torch.testing.assert_close(controlled, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_without_condition_and_text_it_is_the_base_with_the_empty_text(base: Path) -> None:
    denoiser, x = awake(build_denoiser(config_of(base))), noise(2, 4, R, R)
    text, control = noise(2, TOKENS, WIDTH), noise(2, F * F, R, R)
    empty = network_of(denoiser).no_text.expand(2, -1, -1)
    nothing = denoiser(x, 0.7)
    torch.testing.assert_close(nothing, denoiser(x, 0.7, None, empty, torch.zeros_like(control)))
    half = [torch.cat([given[:1], torch.zeros_like(given[1:])]) for given in (text, control)]
    mixed = denoiser(x, 0.7, None, *half)
    torch.testing.assert_close(mixed[1], nothing[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[0], denoiser(x, 0.7, None, text, control)[0], atol=1e-5, rtol=1e-5)
    assert (mixed[0] - nothing[0]).abs().max() > 1e-3


@torch.no_grad()
def test_coordinates_only_reach_the_controlnet(base: Path) -> None:
    denoiser, x, control = awake(build_denoiser(config_of(base))), noise(1, 4, R, R), noise(1, F * F, R, R)
    corner = coordinate_grid(2 * R, 2 * R)[None, :, :R, :R]
    assert (denoiser(x, 1.0, corner, None, control) - denoiser(x, 1.0, None, None, control)).abs().max() > 1e-4
    assert torch.equal(denoiser(x, 1.0, corner), denoiser(x, 1.0))
    without = build_denoiser(config_of(base, "none"))
    assert network_of(without).controlnet.config.conditioning_channels == 1
    assert network_of(denoiser).controlnet.config.conditioning_channels == 3


def test_the_loss_is_that_of_the_prediction(base: Path) -> None:
    denoiser = awake(build_denoiser(config_of(base)))
    clean, eps, sigma, text = noise(4, 4, R, R), noise(4, 4, R, R, seed=1), noise(4).exp(), noise(4, TOKENS, WIDTH)
    network, spread = network_of(denoiser), sigma[:, None, None, None]
    found = denoising_loss(denoiser, clean, eps, sigma, None, text, condition=noise(4, F * F, R, R))
    scale = 1 / (1 + spread**2).sqrt()
    grid = coordinate_grid(R, R)[None].expand(4, -1, -1, -1)
    x = torch.cat([scale * (clean + spread * eps), grid, noise(4, F * F, R, R)], dim=1)
    target = eps if network.prediction == "epsilon" else scale * eps - spread * scale * clean  # Salimans & Ho 2022
    wanted = (network(x, network.time_steps(sigma), text) - target).square().flatten(1).mean(1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_only_the_controlnet_has_gradients_averages_and_weights(base: Path) -> None:
    denoiser = awake(build_denoiser(config_of(base)))
    network = network_of(denoiser)
    assert {name.split(".")[1] for name, _ in denoiser.named_parameters()} == {"controlnet"}
    assert set(denoiser.state_dict()) == {name for name, _ in denoiser.named_parameters()} | {"model.no_text"}
    average = HalfLifeEMA(denoiser, 100.0)
    assert network_of(average.module).frozen is network.frozen  # type: ignore[arg-type]
    assert copy.deepcopy(denoiser).model.frozen is network.frozen  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in network.frozen.state_dict().items()}
    denoiser(noise(2, 4, R, R), 1.0, None, None, noise(2, F * F, R, R)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())
    assert all(parameter.grad is None for parameter in network.frozen.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.frozen.state_dict().items())
    denoiser.to(torch.float64)
    assert next(network.frozen.parameters()).dtype == torch.float64


def test_skeleton_needs_no_weights(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(base)
    monkeypatch.setenv(BASE_FOLDER, "/nowhere")
    assert halvings_of(config) == 1
    bare = skeleton(config)
    assert network_of(bare).frozen.conv_in.weight.is_meta and next(bare.parameters()).is_meta
    with pytest.raises(ValueError, match="/nowhere"):
        build_denoiser(config)


def test_another_base_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(base)
    monkeypatch.setenv(BASE_FOLDER, str(save_tiny_base(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match=config.network_options["base_sha256"][:12]):
        build_denoiser(config)
    monkeypatch.delenv(BASE_FOLDER)
    with pytest.raises(ValueError, match="9 channels"):
        build_denoiser(config_of(save_tiny_base(tmp_path / "inpainting", channels=9)))
    unet = json.loads((base / "unet" / "config.json").read_text())
    huge = {**config.network_options, "unet": {**unet, "layers_per_block": 10**9}}
    with pytest.raises(ValueError, match="1000000000"):
        skeleton(replace(config, network_options=huge))
