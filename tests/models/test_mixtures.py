"""In a mixture of normals in the plane, samplers and guidance with the exact denoiser end where theory says.

The mixture is made after the description in Karras et al. 2024 ("Guiding a diffusion model with a bad version of
itself", section 3): two classes, each a tree of narrow normals that branches again and again.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from gaussian_worlds import NormalMixture
from scipy import stats
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from patchloom.models.guidance import guided
from patchloom.models.noise import karras_sigmas
from patchloom.models.samplers import ancestral, ddim, dpmpp_2m, dpmpp_2m_sde, euler, heun, plms

COUNT = 2000
DEVIATIONS = 4.0
SHARES = (0.65, 0.35)  # of the classes
FORKS, TURN, SHRINK = 3, 0.55, 0.65  # branches of a tree from the trunk to a tip; angle and relative length at a fork
DIRECTIONS = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)


@cache
def tree() -> tuple[NormalMixture, Tensor]:
    """The mixture, and the class of each component."""
    weights, means, covariances, classes = [], [], [], []

    def grow(start: np.ndarray, angle: float, length: float, fork: int, share: float, label: int) -> None:
        along = np.array([math.cos(angle), math.sin(angle)])
        across = np.array([-along[1], along[0]])
        weights.append(share / FORKS)
        means.append(start + along * length / 2)
        covariances.append((length / 4) ** 2 * np.outer(along, along) + (length / 25) ** 2 * np.outer(across, across))
        classes.append(label)
        if fork < FORKS:
            for side in (-1, 1):
                grow(start + along * length, angle + side * TURN, length * SHRINK, fork + 1, share / 2, label)

    for label, angle in enumerate((0.9, 2.0)):
        grow(np.array([0.1 - 0.2 * label, -0.6]), angle, 0.6, 1, SHARES[label], label)
    mixture = NormalMixture(
        torch.tensor(weights).double(), *(torch.from_numpy(np.stack(x)) for x in (means, covariances))
    )
    return mixture, torch.tensor(classes)


def denoiser(x: Tensor, sigma: Tensor, coordinates: None = None, labels: Tensor | None = None) -> Tensor:
    """The ideal denoiser, called as a network is: (B, 2, 1, 1) points, and labels (B, 2), where zeros are no class."""
    mixture, classes = tree()
    allowed = None if labels is None else (labels[:, classes] > 0) | (labels.sum(1, keepdim=True) == 0)
    return mixture.denoise(x.flatten(1), sigma.expand(len(x)), allowed)[:, :, None, None]


def one_hot_rows(label: int | None, count: int) -> Tensor | None:
    return None if label is None else torch.eye(2)[label].expand(count, 2)


def of_class(label: int | None) -> NormalMixture:
    mixture, classes = tree()
    return mixture if label is None else mixture.chosen(classes == label)


def log_density(mixture: NormalMixture, x: Tensor, sigma: float) -> Tensor:
    """By torch.distributions: (n, 2) points -> (n,)."""
    normals = MultivariateNormal(mixture.means, mixture.covariances + sigma**2 * torch.eye(2).double())
    found: Tensor = MixtureSameFamily(Categorical(mixture.weights), normals).log_prob(x)
    return found


def score(mixture: NormalMixture, x: Tensor, sigma: float) -> Tensor:
    """The gradient of the log density, by autograd."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(log_density(mixture, x, sigma).sum(), x)
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("label", [None, 0, 1])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0])
def test_the_exact_denoiser_follows_the_score(label: int | None, sigma: float) -> None:
    x = 0.7 * drawn(50, 2) * max(1, sigma)
    wanted = x + sigma**2 * score(of_class(label), x, sigma)
    found = denoiser(x[:, :, None, None], torch.tensor(sigma, dtype=torch.float64), labels=one_hot_rows(label, 50))
    torch.testing.assert_close(found.flatten(1), wanted, rtol=1e-8, atol=1e-8)


class Draws:
    """Normal noise from one generator, for all points together."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Tensor:
        return torch.randn(COUNT, 2, 1, 1, generator=self.generator, dtype=torch.float64)


def assert_drawn_from(points: Tensor, mixture: NormalMixture) -> None:
    """(n, 2) points have the mean, the covariance and the distributions along four directions of the mixture."""
    moments, n = mixture.moments, len(points)
    centred = points - moments.mean
    products = centred[:, :, None] * centred[:, None, :]
    for found, wanted in ((points, moments.mean), (products, moments.covariance)):
        z = (found.mean(0) - wanted) / (found.std(0) / n**0.5)
        assert float(z.abs().max()) < DEVIATIONS
    for direction in DIRECTIONS:
        along = (points @ direction).numpy()
        assert stats.kstest(along, partial(mixture.cdf, direction)).pvalue > 1e-4


def share_of_first_class(points: Tensor) -> Tensor:
    """P(class 0 | point), (n,); its mean over points of the mixture is the weight of the class."""
    mixture, classes = tree()
    shares, _, _ = mixture.log_shares(points, torch.zeros(len(points)).double())
    return shares.softmax(1)[:, classes == 0].sum(1)


SAMPLERS: dict[str, tuple[Callable[..., Tensor], int]] = {  # with steps whose error is below that of sampling
    "heun": (heun, 30), "heun-churn": (partial(heun, churn=10.0), 60), "euler": (euler, 80), "ddim": (ddim, 80),
    "ancestral": (ancestral, 120), "dpmpp-2m": (dpmpp_2m, 40), "dpmpp-2m-sde": (dpmpp_2m_sde, 80), "plms": (plms, 30),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_samplers_reach_the_mixture(name: str) -> None:
    sampler, steps = SAMPLERS[name]
    noise, sigmas = Draws(seed=1), karras_sigmas(steps)
    options = {"noise": noise} if name in ("heun-churn", "ancestral", "dpmpp-2m-sde") else {}
    points = sampler(guided(denoiser, None), noise() * sigmas[0], sigmas, **options).flatten(1)
    assert_drawn_from(points, of_class(None))
    share = share_of_first_class(points)
    assert abs(float(share.mean()) - SHARES[0]) < DEVIATIONS * float(share.std()) / COUNT**0.5


@pytest.mark.parametrize("label", [0, 1])
def test_guidance_of_1_reaches_the_class_and_of_0_the_mixture(label: int) -> None:
    sigmas = karras_sigmas(30)
    start = Draws(seed=2 + label)() * sigmas[0]
    for guidance, wanted in ((1.0, of_class(label)), (0.0, of_class(None))):
        points = heun(guided(denoiser, one_hot_rows(label, COUNT), guidance), start, sigmas).flatten(1)
        assert_drawn_from(points, wanted)


@pytest.mark.parametrize(("guidance", "in_one_batch"), [(0.5, False), (2.0, True)])
def test_guided_points_follow_the_guided_score(guidance: float, in_one_batch: bool) -> None:
    label, top, bottom = 1, 10.0, 0.02
    start = drawn(8, 2, seed=5) * top

    def slope(sigma: float, flat: np.ndarray) -> np.ndarray:  # dx / dsigma = -sigma * score (EDM, Eq. 1)
        x = torch.from_numpy(flat).view(8, 2)
        towards, away = (score(of_class(which), x, sigma) for which in (label, None))
        found: np.ndarray = (-sigma * (away + guidance * (towards - away))).flatten().numpy()
        return found

    wanted = solve_ivp(slope, (top, bottom), start.flatten().numpy(), rtol=1e-6, atol=1e-7).y[:, -1].reshape(8, 2)
    sigmas = karras_sigmas(200, sigma_min=bottom, sigma_max=top)[:-1]
    denoise = guided(denoiser, one_hot_rows(label, 8), guidance, in_one_batch=in_one_batch)
    found = heun(denoise, start[:, :, None, None], sigmas).flatten(1)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-3)


def test_guidance_moves_points_into_their_class() -> None:
    sigmas, shares = karras_sigmas(20), []
    start = drawn(300, 2, 1, 1, seed=7) * sigmas[0]
    for guidance in (0.0, 1.0, 2.0, 4.0):
        points = heun(guided(denoiser, one_hot_rows(0, len(start)), guidance), start, sigmas).flatten(1)
        shares.append(float(share_of_first_class(points).mean()))
    assert shares == sorted(shares) and shares[-1] > 0.99


# One normal each, with and without the class: the guided path has a closed form


@pytest.mark.parametrize("guidance", [0.5, 1.0, 2.0, 4.0])
def test_guidance_multiplies_a_shift_of_the_mean(guidance: float) -> None:
    mean, spread = 0.4, 0.5

    def network(x: Tensor, sigma: Tensor, coordinates: None, labels: Tensor | None) -> Tensor:
        centre = 0.0 if labels is None else mean
        return centre + (x - centre) * spread**2 / (spread**2 + sigma**2)

    sigmas = karras_sigmas(200, sigma_max=20)
    start = drawn(20, 1, 2, 2) * 20
    found = heun(guided(network, torch.ones(20, 1), guidance), start, sigmas)
    wanted = guidance * mean + (start - guidance * mean) * spread / (spread**2 + 20**2) ** 0.5
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-3)


@pytest.mark.parametrize("guidance", [0.5, 1.0, 2.0, 4.0])
def test_guidance_narrows_as_a_power_of_the_standard_deviations(guidance: float) -> None:
    narrow, wide = 0.3, 0.6

    def network(x: Tensor, sigma: Tensor, coordinates: None, labels: Tensor | None) -> Tensor:
        variance = (wide if labels is None else narrow) ** 2
        return x * variance / (variance + sigma**2)

    def factor(
        sigma: float,
    ) -> float:  # dx / dsigma = x sigma (g / (narrow^2 + sigma^2) + (1 - g) / (wide^2 + sigma^2))
        return math.hypot(narrow, sigma) ** guidance * math.hypot(wide, sigma) ** (1 - guidance)

    sigmas = karras_sigmas(200, sigma_max=20)
    start = drawn(20, 1, 2, 2) * 20
    found = heun(guided(network, torch.ones(20, 1), guidance), start, sigmas)
    torch.testing.assert_close(found, start * factor(0) / factor(20), rtol=2e-3, atol=0)
