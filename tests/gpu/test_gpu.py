"""A GPU does what the CPU does, waits for nothing, and launches as much for any batch.

`make test-gpu` runs this with torch, numpy, safetensors and pytest. Without a GPU the same code compares the CPU with
itself, in fewer steps.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu_checks import (
    CLASSES,
    Work,
    distance,
    no_waiting,
    seeded_denoiser,
    started,
    step_launches,
    take_step,
    train_in_a_process,
    trained_weights,
)
from small_networks import NETWORKS, SIDE, small_config

from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.features import POOL, SPATIAL, InceptionFeatures
from patchloom.models.generate import SAMPLERS, Sampling, generate
from patchloom.models.inception import Inception
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.replay import NetworkCall, ReplayedNetwork, cuda_graph
from patchloom.models.step import set_rounding

CPU = torch.device("cpu")
WEIGHTS_BOUND = 1e-4  # relative L2 of the weights after ten steps in fp32
# relative L2 of the gradients and losses of a step, to those of fp32; on the CPU .0034 in bf16 and .0005 in fp16
PRECISION_BOUNDS = {"tf32": 0.005, "bf16": 0.02, "fp16": 0.005}
LEVELS_BOUND = 0.02  # mean difference of images, of 255 levels

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a check."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def exact_rounding() -> None:
    """Every check starts without TF32."""
    set_rounding("fp32")


@pytest.mark.parametrize("network", list(NETWORKS))
def test_ten_steps_give_the_weights_of_the_cpu(network: str, device: torch.device) -> None:
    work = Work(network, steps=10 if device.type == "cuda" else 1)
    assert distance(trained_weights(work, device), trained_weights(work, CPU)) < WEIGHTS_BOUND


def sampled_on(device: torch.device, sampler: str) -> torch.Tensor:
    denoiser, normalisation = seeded_denoiser("DDPM++").to(device).eval(), pixel_normalisation()
    card = ModelCard(denoiser=small_config("DDPM++", classes=CLASSES), normalisation=normalisation)
    sampling = Sampling(sampler, 5, guidance=1.3, guidance_between=(0.1, 20.0))
    model = SamplingModel(denoiser, normalisation, None, card)
    with no_waiting(device):
        images = generate(model, [0, 1, 2**40], [0, -1, 3], sampling)
    return images.cpu().float()


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_every_sampler_gives_the_images_of_the_cpu_without_waiting(sampler: str, device: torch.device) -> None:
    found, wanted = sampled_on(device, sampler), sampled_on(CPU, sampler)
    assert wanted.std() > 10
    assert float((found - wanted).abs().mean()) < LEVELS_BOUND


def as_it_is(evaluation: NetworkCall) -> NetworkCall:
    """The recording of a CPU, which has no graphs."""
    return evaluation


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_evaluations_give_the_bytes_of_the_network(precision: str, device: torch.device) -> None:
    denoiser, normalisation = seeded_denoiser("ADM").to(device).eval().requires_grad_(False), pixel_normalisation()
    card = ModelCard(denoiser=small_config("ADM", classes=CLASSES), normalisation=normalisation)
    replayed = ReplayedNetwork(denoiser, cuda_graph if device.type == "cuda" else as_it_is)
    plain = SamplingModel(denoiser, normalisation, None, card)
    sampling = Sampling("heun", 5, guidance=1.3, guidance_between=(0.1, 20.0), precision=precision)
    for seeds in ([0, 1, 2], [3, 4, 5], [6, 7]):  # the same recordings, then others
        found, wanted = (
            generate(model, seeds, [0, -1, 3][: len(seeds)], sampling)
            for model in (replace(plain, replayed=replayed), plain)
        )
        assert torch.equal(found, wanted)


def test_inception_gives_the_features_of_the_cpu(device: torch.device) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        state = Inception().state_dict()
    images = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, wanted = (InceptionFeatures(state, None, each)(images.to(each)) for each in (device, CPU))
    assert max(distance(found[name], wanted[name]) for name in (POOL, SPATIAL)) < 1e-3


def first_step(work: Work, device: torch.device) -> list[torch.Tensor]:
    """The gradients of the first step, without the scale of the loss, and its losses by size and noise level."""
    state = started(work, device)
    take_step(state, work)
    return [state.gradients.flat[: state.gradients.length], state.gradients.loss_and_crops[..., 0]]


@pytest.mark.parametrize("precision", list(PRECISION_BOUNDS))
def test_gradients_and_losses_in_other_precisions_are_near_those_of_fp32(precision: str, device: torch.device) -> None:
    found, wanted = (first_step(Work(precision=each), device) for each in (precision, "fp32"))
    for one, other in zip(found, wanted, strict=True):
        assert distance(one, other) < PRECISION_BOUNDS[precision]


@pytest.mark.slow
def test_a_compiled_network_trains_as_an_eager_one(device: torch.device) -> None:
    steps = 3 if device.type == "cuda" else 1  # a graph per patch size
    works = [Work(draw="shared", steps=steps, compiled=compiled) for compiled in (True, False)]
    found, wanted = (trained_weights(work, device) for work in works)
    assert distance(found, wanted) < WEIGHTS_BOUND


def test_two_processes_on_one_device_train_as_one(device: torch.device, tmp_path: Path) -> None:
    work = Work(steps=3 if device.type == "cuda" else 1)
    torch.multiprocessing.spawn(train_in_a_process, (2, work, str(device), str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert distance(found, trained_weights(work, device)) < WEIGHTS_BOUND


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("draw", ["shared", "stratified"])
def test_a_step_waits_for_nothing(draw: str, precision: str, device: torch.device) -> None:
    work = Work(draw=draw, precision=precision)
    state = started(work, device)
    for _ in range(2):
        take_step(state, work, around=lambda: no_waiting(device))
    assert state.step == 2


def test_a_step_launches_as_much_for_any_batch(device: torch.device) -> None:
    counts = step_launches([Work(draw="shared", batch=batch) for batch in (8, 32)], device)
    assert counts[0] > 500
    assert abs(counts[1] / counts[0] - 1) < 0.05  # libraries choose other kernels for other sizes


def test_steps_do_not_keep_memory(device: torch.device) -> None:
    work = Work()
    state = started(work, device)
    kept = []
    for _ in range(4):
        take_step(state, work)
        kept.append(torch.cuda.memory_allocated(device) if device.type == "cuda" else 0)
    assert kept[1] == kept[3]
