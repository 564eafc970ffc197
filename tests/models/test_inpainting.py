"""In-painting keeps what is known, and samples the rest as its closed-form distribution says."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gaussian_worlds import GaussianField, ideal
from torch import Tensor

from patchloom.models.generate import SAMPLERS, Sampling
from patchloom.models.inpainting import KnownPixels, Reconstruction, keep_known
from patchloom.models.noise import karras_sigmas, linear_sigmas
from patchloom.models.normalisation import Normalisation, identity_normalisation
from patchloom.models.samplers import SeededNoise, heun, resampled

CPU = torch.device("cpu")
CANVAS, MIDDLE = (2, 3, 9, 8), (..., slice(3, 6), slice(2, 6))
METHODS = {"keep_known": keep_known, "reconstruction": Reconstruction}
Denoise = Callable[[Tensor, Tensor], Tensor]

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_the_middle(values: Tensor) -> tuple[Tensor, Tensor]:
    """Known values on the canvas, and their mask."""
    canvas, mask = torch.zeros(len(values), *CANVAS[1:]).double(), torch.zeros(1, 1, *CANVAS[2:], dtype=torch.bool)
    canvas[MIDDLE], mask[MIDDLE] = values, True
    return canvas, mask


def wild(x: Tensor, sigma: Tensor) -> Tensor:
    """An estimate whose Jacobian is neither positive nor symmetric."""
    return torch.sin(7 * x) + x.roll(1, dims=3) / (1 + sigma)


@every_method
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("ladder", [karras_sigmas, linear_sigmas], ids=["karras", "linear"])
@pytest.mark.parametrize("surroundings", [ideal, wild], ids=["ideal", "wild"])
def test_every_sampler_ends_with_the_known_values(
    sampler: Callable[..., Tensor], ladder: Callable[[int], Tensor], surroundings: Denoise, method: type[Reconstruction]
) -> None:
    center, sigmas = drawn(1, 2, 3, 3, 4), ladder(18)
    options = {"noise": SeededNoise([0, 1], CANVAS[1:])} if "noise" in sampler.__annotations__ else {}
    made = sampler(method(surroundings, *in_the_middle(center)), sigmas[0] * drawn(0, *CANVAS), sigmas, **options)
    torch.testing.assert_close(made[MIDDLE], center, rtol=0, atol=1e-12)
    assert torch.isfinite(made).all()


@every_method
def test_the_noise_of_known_values_falls_with_the_level_and_keeps_its_direction(method: type[Reconstruction]) -> None:
    calls: list[tuple[Tensor, Tensor]] = []

    def recorded(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append((x.detach().clone(), sigma))
        return ideal(x, sigma)

    start, center = 80 * drawn(0, *CANVAS), drawn(1, 1, 3, 3, 4)
    heun(method(recorded, *in_the_middle(center)), start, karras_sigmas(18))
    direction = (start[MIDDLE] - center) / 80
    for x, sigma in calls:
        torch.testing.assert_close(x[MIDDLE], center + sigma * direction, rtol=0, atol=1e-12)


def test_replacing_changes_neither_the_other_values_nor_the_input() -> None:
    x = drawn(0, *CANVAS)
    before = x.clone()
    kept = keep_known(lambda x, sigma: x, *in_the_middle(torch.zeros(1, 3, 3, 4)))(x, torch.tensor(1.0))
    assert torch.equal(x, before)
    assert (kept[MIDDLE] == 0).all()
    kept[MIDDLE] = before[MIDDLE]
    assert torch.equal(kept, before)


def test_the_images_of_a_batch_do_not_depend_on_each_other() -> None:
    x, center = drawn(0, *CANVAS), drawn(1, 2, 3, 3, 4)
    together, sigmas = Reconstruction(wild, *in_the_middle(center)), karras_sigmas(4)
    made = heun(together, 80 * x, sigmas)
    other = torch.cat([x[:1], drawn(7, 1, *CANVAS[1:])])
    again = heun(Reconstruction(wild, *in_the_middle(center)), 80 * other, sigmas)
    assert torch.equal(made[0], again[0])


# A Gaussian field, of which the middle is known

SIDE, LENGTH, DRAWS = 24, 6.0, 128


def exponential_field(side: int, length: float) -> GaussianField:
    """A field of standard deviation .5, with the covariance exp(-distance / length)."""
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double()
    covariance = 0.25 * torch.exp(-torch.cdist(places, places) / length)
    return GaussianField(torch.zeros(side * side).double(), covariance)


class KnownMiddle:
    """A field given its middle: what the rest is like in theory, and how samples compare with it."""

    def __init__(self, seed: int, side: int = SIDE, length: float = LENGTH) -> None:
        self.field, self.side, self.middle = exponential_field(side, length), side, slice(side // 4, side - side // 4)
        self.mask = torch.zeros(1, 1, side, side, dtype=torch.bool)
        self.mask[..., self.middle, self.middle] = True
        self.known = self.mask.flatten()
        truth = self.field.draw(1, seed).double().flatten()
        covariance = self.field.covariance
        weights = torch.linalg.solve(covariance[self.known][:, self.known], covariance[self.known][:, ~self.known]).T
        mean, given = truth.clone(), torch.zeros_like(covariance)
        mean[~self.known] = weights @ truth[self.known]
        rest = covariance[~self.known][:, ~self.known] - weights @ covariance[self.known][:, ~self.known]
        unknown = (~self.known).nonzero()
        given[unknown, unknown.T] = rest
        self.given = GaussianField(mean, given)
        self.values = truth.view(1, 1, side, side) * self.mask

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact denoiser of the field, which does not know the middle."""
        return self.field.denoise(x.flatten(1), sigma.expand(len(x))).view_as(x)

    def denoise_given(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The exact denoiser of the field given the middle."""
        clean = self.given.denoise(x.flatten(1), sigma.expand(len(x))).view_as(x)
        return torch.where(self.mask, self.values, clean)

    def border(self) -> tuple[Tensor, Tensor]:
        """The numbers of the pixels on both sides of the border: inside, outside."""
        numbers, known = torch.arange(self.side**2).view(self.side, self.side), self.middle
        first, last = known.start, known.stop - 1
        inside = [numbers[first, known], numbers[last, known], numbers[known, first], numbers[known, last]]
        above, below, left, right = first - 1, last + 1, first - 1, last + 1
        outside = [numbers[above, known], numbers[below, known], numbers[known, left], numbers[known, right]]
        return torch.cat(inside), torch.cat(outside)

    def compare(self, samples: Tensor) -> tuple[float, float]:
        """The rms step across the border over the true one, and the rms deviation of the mean of the samples.

        The deviation is in standard deviations of the field. The mean of exact samples has sqrt(v / n), where v is the
        mean variance of the surroundings given the middle: .070 for 128 samples.
        """
        inside, outside = self.border()
        rows = samples.flatten(1)
        step = (rows[:, inside] - rows[:, outside]).square().mean().sqrt()
        mean, variance = self.given.mean, self.given.covariance.diagonal()
        true = ((mean[inside] - mean[outside]) ** 2 + variance[outside]).mean().sqrt()
        deviation = (rows.mean(0) - mean)[~self.known].square().mean().sqrt() / 0.5
        return float(step / true), float(deviation)


@pytest.fixture(scope="module", params=[3, 4])
def world(request: pytest.FixtureRequest) -> KnownMiddle:
    return KnownMiddle(request.param)


def outpainted(denoise: Denoise, repeats: int = 1, side: int = SIDE) -> Tensor:
    """128 images by the default sampler, 18 steps of Heun."""
    return Sampling()(denoise, SeededNoise(list(range(DRAWS)), (1, side, side)), repeats)


def test_reconstruction_joins_as_the_field_does(world: KnownMiddle) -> None:
    """At most 1.15 times the true step, and .15 from the mean, where exact samples have 1.06 and .077."""
    step, deviation = world.compare(outpainted(Reconstruction(world.denoise, world.values, world.mask)))
    assert 0.9 < step < 1.15
    assert deviation < 0.15
    exact_step, exact_deviation = world.compare(outpainted(world.denoise_given))
    assert 0.9 < exact_step < 1.1
    assert exact_deviation < 0.09


def test_resampling_is_between_replacing_and_reconstruction(world: KnownMiddle) -> None:
    kept = keep_known(world.denoise, world.values, world.mask)
    step, deviation = world.compare(outpainted(kept))
    resampled_step, resampled_deviation = world.compare(outpainted(kept, repeats=4))
    assert step > 1.5 and deviation > 0.25
    assert 1.1 < resampled_step < 0.8 * step
    assert 0.15 < resampled_deviation < 0.9 * deviation


@pytest.mark.slow
def test_methods_on_six_larger_fields() -> None:
    """The table of docs/decisions/032; -s prints it."""
    found: dict[str, list[tuple[float, float]]] = {"exact": [], "reconstruct": [], "resample": [], "replace": []}
    for seed in range(6):
        world = KnownMiddle(seed, side=32, length=8.0)
        kept = keep_known(world.denoise, world.values, world.mask)
        reconstruction = Reconstruction(world.denoise, world.values, world.mask)
        methods = {"exact": world.denoise_given, "reconstruct": reconstruction, "resample": kept, "replace": kept}
        for method, denoise in methods.items():
            repeats = 4 if method == "resample" else 1
            found[method].append(world.compare(outpainted(denoise, repeats, side=32)))
    for method, values in found.items():
        for name, row in zip(("step", "deviation"), np.array(values).T, strict=True):
            print(f"{method}: {name} {row.mean():.3f} ({row.min():.3f} to {row.max():.3f})")
    assert max(step for step, _ in found["reconstruct"]) < 1.15
    assert max(deviation for _, deviation in found["reconstruct"]) < 0.15
    assert min(step for step, _ in found["replace"]) > 1.4


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0, 50.0])
def test_one_known_value_gives_the_exact_estimate(world: KnownMiddle, sigma: float) -> None:
    """With one known value the equation of v is a number's, and the estimate that of x and y together."""
    mask = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
    mask[..., 5, 9] = True
    number, value = int(mask.flatten().nonzero()), 0.7
    x = drawn(0, 2, 1, SIDE, SIDE) * math.hypot(0.5, sigma)
    made = Reconstruction(world.denoise, torch.full_like(mask, value, dtype=torch.float64), mask)(
        x, torch.tensor(sigma)
    )
    posterior = world.field.covariance - world.field.covariance @ torch.linalg.solve(
        world.field.covariance + sigma**2 * torch.eye(SIDE * SIDE).double(), world.field.covariance
    )
    clean = world.denoise(x, torch.tensor(sigma)).flatten(1)
    wanted = clean + (value - clean[:, number, None]) * posterior[number] / posterior[number, number]
    torch.testing.assert_close(made.flatten(1), wanted, rtol=1e-6, atol=1e-8)


# Resampling


def test_a_step_that_is_made_once_is_plain_sampling() -> None:
    start, sigmas = 80 * drawn(0, *CANVAS), karras_sigmas(6)
    once = resampled(heun, ideal, start, sigmas, SeededNoise([0, 1], CANVAS[1:]), 1)
    assert torch.equal(once, heun(ideal, start, sigmas))


def test_resampling_keeps_the_distribution_of_a_perfect_denoiser() -> None:
    """Normal data of variance .25: exact steps, again from new noise, change nothing but the errors of the steps."""
    start = karras_sigmas(18)[0] * drawn(0, 64, 3, 16, 16)
    made = resampled(heun, ideal, start, karras_sigmas(18), SeededNoise(list(range(64)), (3, 16, 16)), 4)
    n = made.numel()
    assert float(made.mean()) == pytest.approx(0, abs=4 * 0.5 / math.sqrt(n))
    plain = heun(ideal, start, karras_sigmas(18))
    assert abs(float(made.var()) - 0.25) <= abs(float(plain.var()) - 0.25) + 4 * 0.25 * math.sqrt(2 / n)


# Known pixels


class AverageCells:
    """An encoder whose latents are the means of cells of 4 x 4 pixels."""

    downscale = 4

    def encode(self, images: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.avg_pool2d(images.float(), 4), None


def test_a_latent_is_known_if_all_of_its_pixels_are() -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 24), dtype=np.uint8))
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[3:13, 8:20] = True  # whole cells: rows 1 and 2, columns 2 to 4
    normalisation = identity_normalisation(3)
    values, known = KnownPixels(image, mask, "replace").values(normalisation, AverageCells(), CPU)  # type: ignore[arg-type]
    wanted = torch.zeros(4, 6, dtype=torch.bool)
    wanted[1:3, 2:5] = True
    assert torch.equal(known[0, 0], wanted)
    means = torch.nn.functional.avg_pool2d(image[None].float(), 4)
    torch.testing.assert_close(values, means * wanted, rtol=0, atol=1e-5)
    image = torch.where(mask, image, 255 - image)  # the unknown pixels do not matter
    again, _ = KnownPixels(image, mask, "replace").values(normalisation, AverageCells(), CPU)  # type: ignore[arg-type]
    assert torch.equal(values, again)


@pytest.mark.parametrize(("method", "factor"), [("replace", 1), ("resample", 4), ("reconstruct", 4)])
def test_evaluations_count_repeats_and_gradients(method: str, factor: int) -> None:
    known = KnownPixels(torch.zeros(3, 8, 8), torch.ones(8, 8, dtype=torch.bool), method)
    sampling, calls = Sampling(steps=5), 0

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x / 2

    denoise = known.estimates(counted, Normalisation("pixels", (127.5,) * 3, (1 / 127.5,) * 3), None, CPU)
    sampling(denoise, SeededNoise([0], (3, 8, 8)), known.repeats)
    assert sampling.evaluations_given(known) == 9 * factor
    assert calls == 9 * known.repeats
