"""A tiny network learns eight images from patches and full images alike, and makes them again at full size."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import photograph
from PIL import Image
from sampling_models import pixel_model
from torch import Tensor

from patchloom.models.cards import DenoiserConfig
from patchloom.models.denoiser import Denoiser, build_denoiser
from patchloom.models.ema import HalfLifeEMA
from patchloom.models.generate import Sampling, generate
from patchloom.models.normalisation import pixel_normalisation
from patchloom.models.patches import coordinate_grid, patch_schedule
from patchloom.models.random_draws import RowOrder
from patchloom.models.step import StoredRows, new_state, training_step
from patchloom.models.step_plan import StepSettings, plan_step

SIDE, UPDATES = 16, 1600
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def eight_images() -> Tensor:
    """(8, 3, 16, 16) uint8: the upper left and the lower right of four photographs."""
    images = []
    for name in NAMES:
        pixels = photograph(name)
        half = min(pixels.shape[:2]) // 2
        for part in (pixels[:half, :half], pixels[-half:, -half:]):
            small = Image.fromarray(part).resize((SIDE, SIDE), Image.Resampling.BOX)
            images.append(np.asarray(small).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(images))


@pytest.fixture(scope="module")
def overfitted() -> tuple[Denoiser, Tensor]:
    """A network of 0.3 M parameters after 1600 steps at p = 0.5, and what it has seen."""
    images = eight_images()
    method = StepSettings(
        seed=1, schedule=patch_schedule(SIDE, 0.5), updates=UPDATES, batch_size=8, block_size=8, lr=2e-3,
        lr_rampup_images=500, noise_mean=0.0, noise_std=1.6,  # wider than EDM's: the last test asks at high noise
    )  # fmt: skip
    torch.manual_seed(0)
    options = {"width": 32, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.0}
    config = DenoiserConfig(network="song", network_options=options, resolution=SIDE, channels=3, classes=8,
                            coordinates="linear", sigma_data=0.5)  # fmt: skip
    denoiser = build_denoiser(config)
    state = new_state(denoiser, [HalfLifeEMA(denoiser, 2000, 0.1)], method, (0.9, 0.99), 1e-8)
    order = RowOrder(8, seed=1)
    for step in range(UPDATES):
        plan = plan_step(method, step, state.images_seen)
        numbers = [torch.from_numpy(order.at(group.crops)) for group in plan.share(0, 1)]
        rows = [StoredRows(images[number], number) for number in numbers]
        falling = replace(method, lr=method.lr * min(1.0, 2.5 * (1 - step / UPDATES)))
        training_step(state, falling, plan, zip(plan.share(), rows, strict=True), pixel_normalisation(), None)
    average = state.emas[0].module
    assert isinstance(average, Denoiser)
    return average, images


def psnr_db(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio of values in -1 ... 1."""
    return 10 * math.log10(4 / float((found - wanted).square().mean()))


def test_eight_images_are_made_again_at_full_size(
    overfitted: tuple[Denoiser, Tensor], artefacts: Callable[[str, Tensor], Path]
) -> None:
    denoiser, images = overfitted
    model = pixel_model(denoiser)
    made = generate(model, list(range(8)), list(range(8)), Sampling(steps=18))
    artefacts("overfit-above-made-below-seen", torch.cat([made, images]))
    normalise = pixel_normalisation().normalise
    found = [psnr_db(normalise(one), normalise(other)) for one, other in zip(made, images, strict=True)]
    print("PSNR dB by image:", [round(value, 1) for value in found])
    assert min(found) > 18 and np.median(found) > 22
    for number in range(8):  # and it is that image, not a mean of all
        others = [psnr_db(normalise(made[number]), normalise(image)) for image in images]
        assert max(range(8), key=others.__getitem__) == number


@torch.no_grad()
def test_coordinates_select_the_content(overfitted: tuple[Denoiser, Tensor]) -> None:
    """From pure noise, a crop's estimate is the part of the image that its coordinates name."""
    denoiser, images = overfitted
    clean, labels = pixel_normalisation().normalise(images), torch.eye(8)
    noise = 80 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grid = coordinate_grid(SIDE, SIDE)
    corners = [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]
    parts = torch.stack([clean[:, :, top : top + 8, left : left + 8] for top, left in corners])
    nearest = []
    for top, left in corners:
        where = grid[None, :, top : top + 8, left : left + 8].expand(8, -1, -1, -1)
        estimate = denoiser(noise, 80.0, where, labels)
        nearest.append((parts - estimate).square().mean((2, 3, 4)).argmin(0))
    named = sum(int((found == number).sum()) for number, found in enumerate(nearest))
    print(f"{named} of 40 crops of pure noise become the part that their coordinates name")
    assert named >= 30  # 8 would be chance
