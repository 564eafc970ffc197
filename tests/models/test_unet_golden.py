"""The networks give the numbers, the parameters and the FLOPs that EDM's reference implementation gives."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.guidance import guided
from patchloom.models.loss import denoising_loss
from patchloom.models.noise import karras_sigmas
from patchloom.models.samplers import heun

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
NAMES = ("edm_ddpmpp", "edm_ncsnpp", "edm_adm")
SIZES = (32, 16, 8)

CELEBA = DenoiserConfig(
    network="song",
    network_options={"width": 128, "width_multipliers": [1, 2, 2, 2], "blocks": 4, "attention": [16]},
    resolution=64, channels=3, classes=0, coordinates="linear", sigma_data=0.5,
)  # fmt: skip
LSUN = DenoiserConfig(
    network="dhariwal", network_options={}, resolution=32, channels=4, classes=0, coordinates="linear", sigma_data=0.5
)


class Golden:
    """One reference network: its tensors, and ours with its weights."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz") as archive:
            self.arrays = {key: archive[key] for key in archive.files}
        self.denoiser = build_denoiser(self._config())
        weights = {key.split("/", 1)[1]: self[key] for key in self.arrays if key.startswith(("param/", "buffer/"))}
        self.denoiser.load_state_dict(weights, strict=True)
        self.denoiser.eval()

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])

    @property
    def labels(self) -> Tensor | None:
        return self["labels"] if "labels" in self.arrays else None

    def _config(self) -> DenoiserConfig:
        theirs = json.loads(self.arrays["config_json"].tobytes())
        options = {
            "width": theirs["model_channels"],
            "width_multipliers": theirs["channel_mult"],
            "blocks": theirs["num_blocks"],
            "attention": theirs["attn_resolutions"],
            "dropout": theirs["dropout"],
        }
        if theirs["model_type"] == "SongUNet":
            options |= {
                "embedding": theirs["embedding_type"],
                "residual_input": theirs["encoder_type"] == "residual",
                "filter_taps": theirs["resample_filter"],
                "noise_width_multiplier": theirs["channel_mult_noise"],
            }
        return DenoiserConfig(
            network={"SongUNet": "song", "DhariwalUNet": "dhariwal"}[theirs["model_type"]],
            network_options=options,
            resolution=theirs["img_resolution"],
            channels=theirs["img_channels_without_coordinates"],
            classes=theirs["label_dim"],
            coordinates="linear",
            sigma_data=0.5,
        )


@pytest.fixture(scope="module")
def golden() -> Callable[[str], Golden]:
    """Reads a reference network once."""
    if not GOLDEN.is_dir():
        pytest.skip("no shared/golden beside the repository: the reference numbers were not checked")
    read: dict[str, Golden] = {}
    return lambda name: read.setdefault(name, Golden(name)) if name not in read else read[name]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_patch_is_denoised_as_the_reference_does(golden: Callable[[str], Golden], name: str, size: int) -> None:
    reference = golden(name)
    noisy = reference[f"s{size}/clean"] + reference[f"s{size}/noise"]
    with torch.no_grad():
        found = reference.denoiser(
            noisy, reference[f"s{size}/sigma"], reference[f"s{size}/coordinates"], reference.labels
        )
    assert relative_error(found, reference[f"s{size}/denoised"]) < 2e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_patch_has_the_loss_of_the_reference(golden: Callable[[str], Golden], name: str, size: int) -> None:
    reference = golden(name)
    sigma = reference[f"s{size}/sigma"]
    unit_noise = reference[f"s{size}/noise"] / sigma[:, None, None, None]  # theirs is scaled already
    with torch.no_grad():
        found = denoising_loss(
            reference.denoiser, reference[f"s{size}/clean"], unit_noise, sigma,
            reference[f"s{size}/coordinates"], reference.labels, reduction="sum",
        )  # fmt: skip
    wanted = reference[f"s{size}/loss_per_sample_sum"]
    assert float(((found - wanted) / wanted).abs().max()) < 1e-4


def sample(denoiser: Denoiser, latents: Tensor, steps: int, labels: Tensor | None, guidance: float = 1.0) -> Tensor:
    sigmas = karras_sigmas(steps)
    return heun(guided(denoiser, labels, guidance), latents.double() * sigmas[0], sigmas)


@pytest.mark.parametrize("name", NAMES)
def test_eight_heun_steps_end_where_the_reference_does(golden: Callable[[str], Golden], name: str) -> None:
    reference = golden(name)
    found = sample(reference.denoiser, reference["sampler/latents"], 8, reference.labels)
    assert relative_error(found, reference["sampler/heun8_deterministic"]) < 1e-4


def test_guidance_ends_where_the_reference_does(golden: Callable[[str], Golden]) -> None:
    reference = golden("edm_adm")
    found = sample(reference.denoiser, reference["sampler/latents"], 8, reference.labels, guidance=1.3)
    assert relative_error(found, reference["sampler/heun8_cfg1.3"]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_canvas_ends_where_the_reference_does(golden: Callable[[str], Golden], name: str) -> None:
    reference = golden(name)
    labels = None if reference.labels is None else reference.labels[:1]
    found = sample(reference.denoiser, reference["sampler/canvas_latents"], 4, labels)
    assert found.shape == (1, 3, 48, 48)
    assert relative_error(found, reference["sampler/canvas_heun4"]) < 1e-4


@pytest.mark.parametrize(("config", "millions"), [(CELEBA, 61.8), (LSUN, 279.6)], ids=["ddpmpp", "adm"])
def test_the_papers_networks_have_the_papers_parameters(config: DenoiserConfig, millions: float) -> None:
    with torch.device("meta"):
        denoiser = build_denoiser(config)
    assert parameter_count(denoiser) / 1e6 == pytest.approx(millions, rel=0.002)


@pytest.mark.parametrize(
    ("config", "size", "giga"),
    [(CELEBA, 64, 251.2), (CELEBA, 32, 62.6), (CELEBA, 16, 15.7), (LSUN, 32, 179.3), (LSUN, 16, 41.3), (LSUN, 8, 10.2)],
    ids=lambda value: value.network if isinstance(value, DenoiserConfig) else str(value),
)
def test_a_training_crop_costs_the_known_flops(config: DenoiserConfig, size: int, giga: float) -> None:
    assert training_flops(config, size) / 1e9 == pytest.approx(giga, rel=0.01)
