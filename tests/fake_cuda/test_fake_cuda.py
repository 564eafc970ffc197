"""Forward passes, losses, the optimiser, sampling and rows on a GPU that is not the first one, in all precisions."""

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_cuda import fake_gpus
from helpers import tiny_recipe
from one_device import OneDevice
from small_networks import NETWORKS, SIDE, small_config
from torch._subclasses.fake_tensor import DataDependentOutputException

from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import SamplingModel
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA, PowerEMA
from patchloom.models.features import POOL, SPATIAL, InceptionFeatures
from patchloom.models.generate import SAMPLERS, Sampling, generate
from patchloom.models.inception import Inception
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import COORDINATE_CHANNELS, patch_schedule
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step
from patchloom.pipelines.train.run import RowReader
from patchloom.platform.dataset.prepared import open_dataset

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA: run make test-fake-cuda"),
]
GPU, OTHER = torch.device("cuda:1"), torch.device("cuda:0")


@pytest.fixture(autouse=True)
def gpus() -> Iterator[None]:
    with warnings.catch_warnings(), fake_gpus():
        warnings.filterwarnings("ignore", "Accessing the data pointer")  # torch's own copy of a tensor
        yield


@pytest.mark.parametrize(
    ("work", "error"),
    [
        (lambda x: x + torch.ones(2), "cuda:1.*cpu"),
        (lambda x: x + torch.ones(2, device=OTHER), "cuda:1.*cuda:0"),
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
    ],
)
def test_fake_gpus_refuse_what_a_gpu_refuses(work: Callable[[torch.Tensor], object], error: str) -> None:
    with pytest.raises((RuntimeError, DataDependentOutputException), match=error):
        work(torch.ones(2, device=GPU))


def denoiser_on_gpu(network: str, **options: Any) -> Denoiser:
    return build_denoiser(small_config(network, **options)).to(GPU).train()


def stored_rows(count: int) -> StoredRows:
    image = torch.zeros(count, 3, SIDE, SIDE, dtype=torch.uint8, device=GPU)
    return StoredRows(image, torch.zeros(count, dtype=torch.int64, device=GPU))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("network", list(NETWORKS))
def test_a_step_stays_on_its_gpu_in_every_precision(network: str, precision: str) -> None:
    denoiser = denoiser_on_gpu(network, augmentation=True, classes=5, patch_size=True)
    settings = StepSettings(
        seed=5, schedule=patch_schedule(SIDE, 0.5), updates=10, batch_size=16, block_size=4, lr=1e-3,
        lr_rampup_images=0, label_dropout=0.1, augmentation=0.12, precision=precision,
    )  # fmt: skip
    averages = [PowerEMA(denoiser, 0.05), HalfLifeEMA(denoiser, 1000)]
    state = new_state(denoiser, averages, settings, (0.9, 0.999), 1e-8)
    plan = plan_step(settings, 0, 0)
    work = [(group, stored_rows(len(group.crops))) for group in plan.share()]
    with OneDevice(GPU):
        training_step(state, settings, plan, work, pixel_normalisation(), lambda _: None)
    assert state.scaler.is_enabled() == (precision == "fp16")
    for module in (denoiser, *(average.module for average in averages)):
        assert {value.device for value in module.state_dict().values()} == {GPU}
    assert state.gradients.loss_and_crops.device == GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("coordinates", list(COORDINATE_CHANNELS))
@pytest.mark.parametrize("network", list(NETWORKS))
def test_networks_stay_on_their_gpu_without_gradients(network: str, coordinates: str, dtype: torch.dtype) -> None:
    denoiser = denoiser_on_gpu(network, coordinates=coordinates).eval()
    noisy = torch.zeros(2, 3, SIDE, SIDE, device=GPU)
    with OneDevice(GPU), torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        estimate = denoiser(noisy, 0.5)
    assert (estimate.device, estimate.dtype, estimate.shape) == (GPU, torch.float32, noisy.shape)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_samplers_stay_on_their_gpu(sampler: str) -> None:
    config, normalisation = small_config("DDPM++", classes=5), pixel_normalisation()
    card = ModelCard(denoiser=config, normalisation=normalisation)
    model = SamplingModel(denoiser_on_gpu("DDPM++", classes=5).eval(), normalisation, None, card)
    sampling = Sampling(sampler, 3, guidance=1.3, guidance_between=(0.1, 20.0), size=(32, 48), canvas="extrapolate")
    with OneDevice(GPU):
        images = generate(model, [0, 1], [0, -1], sampling, torch.zeros(3, SIDE, SIDE, dtype=torch.uint8))
    assert (images.device, images.dtype, images.shape) == (GPU, torch.uint8, (2, 3, 32, 48))


def test_features_are_computed_on_their_gpu() -> None:
    features = InceptionFeatures(Inception().state_dict(), None, GPU)
    found = features(torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device=GPU))
    assert {name: tuple(values.shape) for name, values in found.items()} == {POOL: (2, 2048), SPATIAL: (2, 2023)}
    assert {values.device for values in found.values()} == {GPU}


def test_rows_are_read_to_their_gpu(pixels: Path) -> None:
    reader = RowReader(open_dataset(str(pixels)), tiny_recipe(), GPU, 2)
    with OneDevice(GPU):
        read = reader.rows(range(5)), reader.at(np.arange(3))
    for rows in read:
        assert {rows.image.device, rows.label.device} == {GPU}
        assert rows.image.shape[1:] == (3, 16, 16)
