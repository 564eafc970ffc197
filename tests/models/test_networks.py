"""Networks: the three of EDM give the reference's numbers, and have the published size and cost."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.guidance import guided
from patchloom.models.loss import denoising_loss
from patchloom.models.noise import karras_sigmas
from patchloom.models.samplers import heun

SHARED = Path(os.environ.get("PATCHLOOM_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data")).parent
NAMES = ("edm_ddpmpp", "edm_ncsnpp", "edm_adm")
BASE: dict[str, Any] = {"classes": 0, "coordinates": True, "sigma_data": 0.5}


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """A reference network with its weights, and what the reference made with them."""
    path = SHARED / "golden" / f"{request.param}.npz"
    if not path.is_file():
        pytest.skip(f"reference values are not at {path}")
    with np.load(path) as archive:
        values = {name: torch.from_numpy(archive[name]) for name in archive.files}
    config = json.loads(bytes(values["config_json"].numpy()))
    options = {
        "width": config["model_channels"],
        "width_multipliers": config["channel_mult"],
        "blocks": config["num_blocks"],
        "attention": config["attn_resolutions"],
        "dropout": config["dropout"],
    }
    song = config["model_type"] == "SongUNet"
    if song:
        options |= {
            "embedding": config["embedding_type"],
            "residual_input": config["encoder_type"] == "residual",
            "filter_taps": config["resample_filter"],
            "noise_width_multiplier": config["channel_mult_noise"],
        }
    shape = {"resolution": config["img_resolution"], "channels": 3, "classes": config["label_dim"]}
    denoiser = build_denoiser({"network": "song" if song else "dhariwal", "network_options": options, **BASE, **shape})
    weights = {name.split("/")[1]: values[name] for name in values if name.startswith(("param/", "buffer/"))}
    denoiser.load_state_dict(weights, strict=True)  # the reference's names, one to one
    return denoiser.eval().requires_grad_(False), values


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("size", [32, 16, 8])
def test_a_network_denoises_patches_as_the_reference(golden: Any, size: int) -> None:
    denoiser, values = golden
    patch = {name.split("/")[1]: tensor for name, tensor in values.items() if name.startswith(f"s{size}/")}
    labels = values.get("labels")
    ours = denoiser(patch["clean"] + patch["noise"], patch["sigma"], patch["coordinates"], labels)
    assert relative_error(ours, patch["denoised"]) < 2e-5
    unit = patch["noise"] / patch["sigma"][:, None, None, None]
    loss = denoising_loss(denoiser, patch["clean"], unit, patch["sigma"], patch["coordinates"], labels, "sum")
    torch.testing.assert_close(loss, patch["loss_per_sample_sum"], rtol=1e-4, atol=0)
    mean = denoising_loss(denoiser, patch["clean"], unit, patch["sigma"], patch["coordinates"], labels, "mean")
    torch.testing.assert_close(mean * 3 * size**2, loss, rtol=1e-5, atol=0)


def test_heun_samples_as_the_reference(golden: Any) -> None:
    denoiser, values = golden
    labels, sigmas = values.get("labels"), karras_sigmas(8)
    start = values["sampler/latents"].double() * sigmas[0]
    plain = heun(guided(denoiser, labels), start, sigmas)
    assert relative_error(plain, values["sampler/heun8_deterministic"]) < 1e-4
    if labels is not None:
        strong = heun(guided(denoiser, labels, 1.3), start, sigmas)
        assert relative_error(strong, values["sampler/heun8_cfg1.3"]) < 1e-4


def test_a_larger_canvas_is_sampled_as_the_reference(golden: Any) -> None:
    denoiser, values = golden
    sigmas = karras_sigmas(4)
    labels = values["labels"][:1] if "labels" in values else None
    start = values["sampler/canvas_latents"].double() * sigmas[0]
    ours = heun(guided(denoiser, labels), start, sigmas)
    assert relative_error(ours, values["sampler/canvas_heun4"]) < 1e-4


@pytest.mark.parametrize(
    ("config", "millions", "gflops"),
    [
        (
            {"network": "song", "network_options": {}, "resolution": 64, "channels": 3, **BASE},
            61.8,
            {64: 251.2, 32: 62.6, 16: 15.7},
        ),
        (
            {"network": "dhariwal", "network_options": {}, "resolution": 32, "channels": 4, **BASE},
            279.6,
            {32: 179.3, 16: 41.3, 8: 10.2},
        ),
    ],
    ids=["ddpmpp", "adm"],
)
def test_the_papers_networks_have_the_published_size_and_cost(
    config: dict[str, Any], millions: float, gflops: dict[int, float]
) -> None:
    with torch.device("meta"):
        assert parameter_count(build_denoiser(config)) / 1e6 == pytest.approx(millions, rel=0.01)
    for size, wanted in gflops.items():
        assert training_flops(config, size) / 1e9 == pytest.approx(wanted, rel=0.01)


def small(**changes: Any) -> Denoiser:
    options = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [4], "dropout": 0.0}
    config = {"network": "song", "network_options": options, "resolution": 8, "channels": 2, **BASE, **changes}
    torch.manual_seed(0)
    denoiser = build_denoiser(config).eval().requires_grad_(False)
    for parameter in denoiser.parameters():  # nothing stays near zero, so that every input counts
        parameter.copy_(torch.randn_like(parameter) * 0.1)
    return denoiser


def test_a_denoiser_takes_any_float_and_gives_float32() -> None:
    denoiser, x = small(), torch.randn(3, 2, 8, 8)
    wanted = denoiser(x, torch.full((3,), 0.7))
    for noisy in (x, x.double()):
        for sigma in (0.7, torch.tensor(0.7, dtype=torch.float64), torch.full((3,), 0.7, dtype=torch.float64)):
            got = denoiser(noisy, sigma)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, wanted)


def test_none_is_the_full_grid_and_no_class() -> None:
    from patchloom.models.patches import coordinate_grid

    denoiser, x = small(classes=3), torch.randn(2, 2, 8, 8)
    grid = coordinate_grid(8, 8)[None].expand(2, -1, -1, -1)
    torch.testing.assert_close(denoiser(x, 1.0), denoiser(x, 1.0, grid, torch.zeros(2, 3)))
    assert not torch.allclose(denoiser(x, 1.0), denoiser(x, 1.0, -grid))
    assert not torch.allclose(denoiser(x, 1.0), denoiser(x, 1.0, labels=torch.eye(3)[:2]))


def test_what_a_network_has_no_channels_for_is_refused() -> None:
    x = torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="coordinate"):
        small(coordinates=False)(x, 1.0, torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="classes"):
        small()(x, 1.0, labels=torch.ones(1, 3))


def test_without_noise_the_denoiser_is_the_identity() -> None:
    x = torch.randn(2, 2, 8, 8)
    torch.testing.assert_close(small()(x, 1e-6), x, atol=1e-4, rtol=0)
