"""In worlds of Gaussian data every sampler has the order, the variance, the cost and the end that theory gives it."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from gaussian_worlds import SPREAD, ideal, marginal
from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.generate import SAMPLERS, Sampling
from patchloom.models.guidance import guided
from patchloom.models.noise import karras_sigmas, linear_sigmas
from patchloom.models.samplers import (
    SeededNoise,
    ancestral,
    ddim,
    dpmpp_2m,
    dpmpp_2m_sde,
    euler,
    heun,
    plms,
)

Sampler = Callable[..., Tensor]

DETERMINISTIC: dict[str, Sampler] = {"heun": heun, "euler": euler, "ddim": ddim, "dpmpp-2m": dpmpp_2m, "plms": plms}
STOCHASTIC: dict[str, Sampler] = {
    "ancestral": ancestral,
    "ddim-eta-0.5": partial(ddim, eta=0.5),
    "dpmpp-2m-sde": dpmpp_2m_sde,
    "heun-churn-10": partial(heun, churn=10.0),
}
ALL = {**DETERMINISTIC, **STOCHASTIC}


def each(samplers: dict[str, Sampler]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sampler", list(samplers.values()), ids=list(samplers))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sampled(sampler: Sampler, denoise: Callable[[Tensor, Tensor], Tensor], start: Tensor, sigmas: Tensor) -> Tensor:
    """What the sampler makes, with seeded noise where it takes any."""
    options = {"noise": SeededNoise(list(range(len(start))), tuple(start.shape[1:]))}
    takes_noise = sampler in STOCHASTIC.values() or sampler is heun
    return sampler(denoise, start, sigmas, **options if takes_noise else {})


class Recorded:
    """A denoiser that keeps what it was given and what it said."""

    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor] = ideal) -> None:
        self.denoise = denoise
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.estimates: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls.append((x.clone(), sigma.clone()))
        self.estimates.append(self.denoise(x, sigma))
        return self.estimates[-1]

    @property
    def levels(self) -> list[float]:
        return [float(sigma) for _, sigma in self.calls]


class Counted:
    """Noise of ones that counts its draws."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.draws = shape, 0

    def __call__(self) -> Tensor:
        self.draws += 1
        return torch.ones(self.shape)


# Order of convergence


def path_errors(sampler: Sampler, ladder: Callable[[int], Tensor], steps: tuple[int, ...]) -> np.ndarray:
    """Relative errors at the lowest level above 0, against the exact path of the Gaussian."""
    errors = []
    for number in steps:
        sigmas = ladder(number)[:-1]
        start = sigmas[0] * drawn(0, 1, 1, 2, 2)
        wanted = start * math.sqrt(marginal(sigmas[-1]) / marginal(sigmas[0]))
        errors.append(float(((sampler(ideal, start, sigmas) - wanted) / wanted).abs().max()))
    return np.array(errors)


@pytest.mark.parametrize(
    ("sampler", "order", "end"),
    [(euler, 1, 4e-3), (ddim, 1, 4e-3), (heun, 2, 3e-5), (dpmpp_2m, 2, 3e-5)],
    ids=["euler", "ddim", "heun", "dpmpp-2m"],
)
def test_a_sampler_has_its_order_on_the_ladder_of_edm(sampler: Sampler, order: int, end: float) -> None:
    errors = path_errors(sampler, karras_sigmas, (100, 200, 400, 800))
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.06)
    assert errors[-1] < end


def test_plms_is_of_high_order_where_the_ladder_is_linear() -> None:
    errors = path_errors(plms, partial(linear_sigmas, sigma_max=5.0), (100, 200, 400, 800))
    orders = np.log2(errors[:-1] / errors[1:])
    assert (orders > 3).all()  # 4 of the multistep; its start of 2nd order is local and costs at most one
    assert (orders < 4.5).all()
    assert errors[-1] < 1e-7


def test_ddim_without_eta_takes_eulers_steps() -> None:
    start = 80 * drawn(0, 2, 3, 4, 4)
    denoise = lambda x, sigma: torch.tanh(x / (1 + sigma))  # noqa: E731
    for sigmas in (karras_sigmas(18), karras_sigmas(18)[:-1]):
        torch.testing.assert_close(ddim(denoise, start, sigmas), euler(denoise, start, sigmas), rtol=0, atol=1e-12)


def test_ancestral_is_ddim_with_eta_1() -> None:
    start, sigmas = 80 * drawn(0, 1, 1, 2, 2), karras_sigmas(18)
    noises = [SeededNoise([3], (1, 2, 2)) for _ in range(2)]
    assert torch.equal(
        ancestral(ideal, start, sigmas, noise=noises[0]), ddim(ideal, start, sigmas, eta=1.0, noise=noises[1])
    )


# Variance: for these data all samplers are linear in the start and in the noises, so nothing need be estimated


class UnitDraws:
    """Element k of the batch gets 1 in the k-th draw and 0 in all others: its result is that draw's factor."""

    def __init__(self, draws: int) -> None:
        self.units = iter(torch.eye(draws, dtype=torch.float64))

    def __call__(self) -> Tensor:
        return next(self.units)[:, None, None, None]


def exact_variance(sampler: Sampler, sigmas: Tensor, denoise: Callable[[Tensor, Tensor], Tensor] = ideal) -> float:
    """The variance of what the sampler makes from N(0, SPREAD^2 + sigma_max^2), without sampling error."""
    noise = UnitDraws(len(sigmas))
    return float((sampler(denoise, noise() * marginal(sigmas[0]) ** 0.5, sigmas, noise=noise) ** 2).sum())


@pytest.mark.parametrize(
    ("name", "order", "end"),
    [("ancestral", 1, 1e-2), ("ddim-eta-0.5", 1, 5e-3), ("dpmpp-2m-sde", 2, 2e-4), ("heun-churn-10", 2, 2e-4)],
)
def test_the_variance_of_stochastic_samplers_converges_to_that_of_the_data(name: str, order: int, end: float) -> None:
    errors = []
    for steps in (50, 100, 200, 400, 800):
        sigmas = karras_sigmas(steps)[:-1]
        errors.append(abs(exact_variance(STOCHASTIC[name], sigmas) - marginal(sigmas[-1])))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, order, atol=0.11)
    assert abs(orders[-1] - order) < 0.02
    assert errors[-1] < end


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("ladder", [karras_sigmas, linear_sigmas], ids=["karras", "linear"])
def test_ddim_makes_the_variance_of_its_equations_12_and_16(eta: float, ladder: Callable[[int], Tensor]) -> None:
    sigmas = ladder(30)[:-1]
    kept = 1 / (1 + sigmas.numpy() ** 2)  # alpha-bar, for x of the paper = sqrt(alpha-bar) * x
    variance = kept[0] * marginal(sigmas[0])
    for now, then in itertools.pairwise(kept):
        clean = np.sqrt(now) * SPREAD**2 / (now * SPREAD**2 + 1 - now)  # E[x0 | x] / x
        predicted_noise = (1 - np.sqrt(now) * clean) / np.sqrt(1 - now)
        renewed = eta * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
        factor = np.sqrt(then) * clean + np.sqrt(1 - then - renewed**2) * predicted_noise
        variance = factor**2 * variance + renewed**2
    assert exact_variance(partial(ddim, eta=eta), sigmas) == pytest.approx(variance / kept[-1], rel=1e-10)


@pytest.mark.parametrize("ladder", [karras_sigmas, linear_sigmas], ids=["karras", "linear"])
def test_ancestral_makes_the_variance_of_ddpms_posterior(ladder: Callable[[int], Tensor]) -> None:
    sigmas = ladder(30)[:-1]
    kept = 1 / (1 + sigmas.numpy() ** 2)
    variance = kept[0] * marginal(sigmas[0])
    for now, then in itertools.pairwise(kept):  # Ho et al. 2020, Eq. 7
        alpha = now / then
        clean = np.sqrt(now) * SPREAD**2 / (now * SPREAD**2 + 1 - now)
        factor = (np.sqrt(then) * (1 - alpha) * clean + np.sqrt(alpha) * (1 - then)) / (1 - now)
        variance = factor**2 * variance + (1 - then) / (1 - now) * (1 - alpha)
    assert exact_variance(ancestral, sigmas) == pytest.approx(variance / kept[-1], rel=1e-10)


@each({**STOCHASTIC, "heun-churn-noise": partial(heun, churn=1e9)})
@pytest.mark.parametrize("steps", [2, 3, 18])
def test_where_the_data_is_one_point_the_noise_of_every_level_is_exact(sampler: Sampler, steps: int) -> None:
    point = 0.3
    sigmas = karras_sigmas(steps)[:-1]
    noise = UnitDraws(len(sigmas))
    made = sampler(lambda x, sigma: torch.full_like(x, point), point + noise() * sigmas[0], sigmas, noise=noise)
    assert float(((made - point) ** 2).sum()) == pytest.approx(0.002**2, rel=1e-9)


# EDM's churn


@pytest.mark.parametrize(
    ("churn_min", "churn_max"), [(0.0, math.inf), (0.05, math.inf), (0.0, 5.0), (0.05, 5.0), (81.0, 90.0)]
)
def test_only_levels_between_churn_min_and_churn_max_churn(churn_min: float, churn_max: float) -> None:
    sigmas, noise, recorded = karras_sigmas(18), Counted(1, 1, 2, 2), Recorded()
    heun(recorded, drawn(0, 1, 1, 2, 2), sigmas, churn=1.8, churn_min=churn_min, churn_max=churn_max, noise=noise)
    churns = [churn_min <= sigma <= churn_max for sigma in sigmas[:-1].tolist()]
    assert noise.draws == sum(churns)
    wanted = [sigma * (1.1 if up else 1) for sigma, up in zip(sigmas[:-1].tolist(), churns, strict=True)]
    assert recorded.levels[::2] == pytest.approx(wanted, rel=1e-12)
    assert recorded.levels[1::2] == sigmas[1:-1].tolist()


def test_the_ends_of_the_churn_interval_belong_to_it() -> None:
    sigmas, noise = karras_sigmas(18), Counted(1, 1, 2, 2)
    low, high = float(sigmas[9]), float(sigmas[6])
    heun(ideal, drawn(0, 1, 1, 2, 2), sigmas, churn=5.0, churn_min=low, churn_max=high, noise=noise)
    assert noise.draws == 4


@pytest.mark.parametrize(("churn", "gamma"), [(1.8, 0.1), (7.2, 0.4), (7.5, math.sqrt(2) - 1), (1e6, math.sqrt(2) - 1)])
@pytest.mark.parametrize("churn_noise", [1.0, 1.007])
def test_churn_raises_the_level_by_its_share_of_a_step_and_at_most_by_root_2(
    churn: float, gamma: float, churn_noise: float
) -> None:
    recorded, start, sigmas = Recorded(), drawn(0, 1, 1, 2, 2), karras_sigmas(18)
    heun(recorded, start, sigmas, churn=churn, churn_noise=churn_noise, noise=Counted(1, 1, 2, 2))
    x, sigma = recorded.calls[0]
    assert float(sigma) == pytest.approx(80 * (1 + gamma), rel=1e-12)
    added = 80 * math.sqrt((1 + gamma) ** 2 - 1) * churn_noise  # with noise of 1
    torch.testing.assert_close(x, start + added, rtol=0, atol=1e-11)


def test_heun_without_churn_is_the_deterministic_sampler_and_draws_nothing() -> None:
    start, noise = 80 * drawn(0, 2, 3, 4, 4), Counted(2, 3, 4, 4)
    made = heun(ideal, start, karras_sigmas(18), churn=0.0, churn_noise=1.007, noise=noise)
    assert noise.draws == 0
    assert torch.equal(made, heun(ideal, start, karras_sigmas(18)))


# Calls and ends


@pytest.mark.parametrize("steps", [2, 3, 5, 18])
@pytest.mark.parametrize("name", list(ALL))
def test_a_sampler_makes_the_documented_number_of_float64_calls(name: str, steps: int) -> None:
    recorded = Recorded(lambda x, sigma: ideal(x, sigma).float())
    made = sampled(ALL[name], recorded, 80 * torch.ones(2, 1, 3, 4), karras_sigmas(steps))
    wanted = {"heun": 2 * steps - 1, "heun-churn-10": 2 * steps - 1, "plms": steps + 1}
    assert len(recorded.calls) == wanted.get(name, steps)
    assert made.dtype == torch.float64
    assert made.shape == (2, 1, 3, 4)
    for x, sigma in recorded.calls:
        assert (x.dtype, sigma.dtype) == (torch.float64, torch.float64)
        assert (x.shape, sigma.shape) == ((2, 1, 3, 4), ())
        assert sigma > 0


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp-2m", "ancestral", "ddim-eta-0.5", "dpmpp-2m-sde"])
def test_samplers_of_one_call_a_step_look_at_every_level_once(name: str) -> None:
    recorded, sigmas = Recorded(), karras_sigmas(18)
    sampled(ALL[name], recorded, 80 * drawn(0, 1, 1, 2, 2), sigmas)
    assert recorded.levels == sigmas[:-1].tolist()


def test_plms_looks_twice_at_the_second_level() -> None:
    recorded, sigmas = Recorded(), karras_sigmas(5)
    plms(recorded, 80 * drawn(0, 1, 1, 2, 2), sigmas)
    assert recorded.levels == sigmas[[0, 1, 1, 2, 3, 4]].tolist()


@each(ALL)
def test_one_step_to_0_is_one_evaluation(sampler: Sampler) -> None:
    recorded = Recorded()
    made = sampled(sampler, recorded, 80 * drawn(0, 1, 1, 2, 2), karras_sigmas(1))
    assert len(recorded.calls) == 1
    torch.testing.assert_close(made, recorded.estimates[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["euler", "ddim", "dpmpp-2m", "ancestral", "ddim-eta-0.5", "dpmpp-2m-sde", "heun"])
@pytest.mark.parametrize("steps", [1, 2, 18])
def test_the_last_step_ends_at_the_last_estimate(name: str, steps: int) -> None:
    recorded = Recorded(lambda x, sigma: torch.sin(3 * x))
    made = sampled(ALL[name], recorded, 80 * drawn(0, 1, 1, 4, 4), karras_sigmas(steps))
    if name in ("euler", "heun"):  # x - (x - D) rounds
        rounding = 1e-15 * float(recorded.calls[-1][0].abs().max() + 1)
        torch.testing.assert_close(made, recorded.estimates[-1], rtol=0, atol=rounding)
    else:
        assert torch.equal(made, recorded.estimates[-1])


@pytest.mark.parametrize(("name", "fewer"), [("ancestral", 1), ("ddim-eta-0.5", 1), ("dpmpp-2m-sde", 1)])
def test_noise_is_drawn_once_a_step_but_not_for_the_step_to_0(name: str, fewer: int) -> None:
    noise = Counted(1, 1, 2, 2)
    STOCHASTIC[name](ideal, drawn(0, 1, 1, 2, 2), karras_sigmas(18), noise=noise)
    assert noise.draws == 18 - fewer


@each(STOCHASTIC)
def test_a_stochastic_sampler_without_noise_is_refused(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="noise"):
        sampler(ideal, torch.ones(1, 1, 2, 2), karras_sigmas(3))


@each(ALL)
def test_a_sampler_leaves_its_start_and_its_ladder_as_they_are(sampler: Sampler) -> None:
    start, sigmas = 80 * drawn(0, 1, 1, 2, 2), karras_sigmas(5)
    before = start.clone(), sigmas.clone()
    sampled(sampler, ideal, start, sigmas)
    assert torch.equal(start, before[0])
    assert torch.equal(sigmas, before[1])


# The noise of a seed


def test_noise_of_a_seed_does_not_depend_on_the_batch() -> None:
    alone, among = SeededNoise([9], (3, 8, 8)), SeededNoise([5, 9, 7, 9], (3, 8, 8))
    for _ in range(4):
        single, batch = alone(), among()
        assert torch.equal(single[0], batch[1])
        assert torch.equal(single[0], batch[3])


def test_noise_of_a_seed_is_standard_normal_and_uncorrelated() -> None:
    noise = SeededNoise([5, 9], (3, 64, 64))
    draws = torch.cat([noise().flatten(1) for _ in range(4)])  # 8 of 12288 values
    np.testing.assert_allclose(draws.mean(dim=1), 0, atol=0.04)
    np.testing.assert_allclose(draws.std(dim=1), 1, atol=0.03)
    np.testing.assert_allclose(torch.corrcoef(draws), np.eye(8), atol=0.05)


# Guidance between two levels


@pytest.fixture(scope="module")
def conditional(tiny_denoiser: Callable[..., Denoiser]) -> Denoiser:
    return tiny_denoiser(classes=3)


def evaluations(denoiser: Denoiser, work: Callable[[], object]) -> int:
    """How often the network is called by this work."""
    calls: list[int] = []
    hook = denoiser.model.register_forward_hook(lambda *_: calls.append(1))
    work()
    hook.remove()
    return len(calls)


@torch.no_grad()
@pytest.mark.parametrize(
    ("sigma", "acts"), [(0.1, False), (0.5, False), (0.5001, True), (2.0, True), (5.0, True), (5.001, False)]
)
def test_guidance_acts_above_the_lower_level_and_up_to_the_upper(
    conditional: Denoiser, sigma: float, acts: bool
) -> None:
    x, level, labels = drawn(0, 3, 3, 16, 16), torch.tensor(sigma, dtype=torch.float64), torch.eye(3)
    denoise = guided(conditional, labels, 1.3, (0.5, 5.0))
    assert evaluations(conditional, lambda: denoise(x, level)) == 1 + acts
    with_class = conditional(x, level, labels=labels)
    if acts:
        torch.testing.assert_close(denoise(x, level), 1.3 * with_class - 0.3 * conditional(x, level))
        assert not torch.equal(denoise(x, level), with_class)
    else:
        assert torch.equal(denoise(x, level), with_class)


@torch.no_grad()
def test_guidance_without_labels_has_no_effect(conditional: Denoiser) -> None:
    x, level = drawn(0, 1, 3, 16, 16), torch.tensor(1.0)
    denoise = guided(conditional, None, 1.3)
    assert evaluations(conditional, lambda: denoise(x, level)) == 1
    assert torch.equal(denoise(x, level), conditional(x, level))


# Sampling, the description of all this


@pytest.mark.parametrize(
    ("sampling", "wanted"),
    [
        (Sampling("heun", 18), 35),
        (Sampling("heun", 18, guidance=1.3), 70),
        (Sampling("heun", 18, churn=40.0), 35),
        (Sampling("euler", 18), 18),
        (Sampling("ddim", 50, guidance=0.0), 100),
        (Sampling("ancestral", 50, "vp"), 50),
        (Sampling("dpmpp-2m", 20, "iddpm"), 20),
        (Sampling("dpmpp-2m-sde", 20, "ve", guidance=4.0), 40),
        (Sampling("plms", 50, "linear"), 51),
    ],
    ids=lambda value: f"{value.sampler}-{value.guidance}" if isinstance(value, Sampling) else None,
)
def test_the_evaluations_of_the_network_are_known_beforehand(sampling: Sampling, wanted: int) -> None:
    assert sampling.network_evaluations == wanted


@pytest.mark.parametrize("steps", [5, 18])
def test_guidance_between_levels_costs_only_there(steps: int) -> None:
    sigmas = karras_sigmas(steps).tolist()
    low, high = sigmas[-2], sigmas[2]  # levels of the ladder: the lower one is out, the upper one in
    once = sum(low < sigma <= high for sigma in sigmas[:-1])
    twice = once + sum(low < sigma <= high for sigma in sigmas[1:-1])
    assert once == steps - 3
    assert Sampling("dpmpp-2m", steps, guidance=2.0, guidance_between=(low, high)).network_evaluations == steps + once
    heun_evaluations = Sampling("heun", steps, guidance=2.0, guidance_between=(low, high)).network_evaluations
    assert heun_evaluations == 2 * steps - 1 + twice
    assert Sampling("heun", steps, guidance_between=(low, high)).network_evaluations == 2 * steps - 1


@pytest.mark.parametrize("name", list(SAMPLERS))
@torch.no_grad()
def test_the_network_is_evaluated_as_often_as_was_said(conditional: Denoiser, name: str) -> None:
    sampling = Sampling(name, 4, guidance=1.3, guidance_between=(0.01, 20.0))
    denoise = guided(conditional, torch.eye(3)[:1], 1.3, (0.01, 20.0))
    work = partial(sampling, denoise, SeededNoise([0], (3, 16, 16)))
    assert evaluations(conditional, work) == sampling.network_evaluations


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dpm"}, "sampler.*dpm.*heun, euler"),
        ({"ladder": "cosine"}, "ladder.*cosine.*karras"),
        ({"canvas": "crop"}, "canvas.*crop.*rescale, extrapolate"),
        ({"steps": 0}, "steps.*0.*1"),
        ({"steps": -3}, "steps.*-3.*1"),
        ({"churn": -1.0}, "churn.*-1.0.*0"),
        ({"churn": math.nan}, "churn.*nan.*0"),
        ({"churn_noise": -0.5}, "churn_noise.*-0.5.*0"),
        ({"sampler": "euler", "churn": 10.0}, "churn.*heun.*euler"),
        ({"churn_between": (5.0, 0.3)}, "churn_between.*5-0.3"),
        ({"guidance_between": (5.0, 5.0)}, "guidance_between.*5-5"),
        ({"guidance_between": (-1.0, 5.0)}, "guidance_between.*-1-5"),
        ({"guidance_between": (0.3, math.nan)}, "guidance_between.*0.3-nan"),
        ({"ladder": "iddpm", "steps": 993}, r"steps: 993 .*\b992\b"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_invalid_sampling_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_a_sampling_is_its_sampler_on_its_ladder_from_the_first_draw(name: str) -> None:
    made = Sampling(name, 6)(ideal, SeededNoise([4, 5], (1, 3, 3)))
    noise = SeededNoise([4, 5], (1, 3, 3))
    start = noise().double() * 80
    takes_noise = name in ("ancestral", "dpmpp-2m-sde")
    wanted = SAMPLERS[name](ideal, start, karras_sigmas(6), **{"noise": noise} if takes_noise else {})
    torch.testing.assert_close(made, wanted, rtol=1e-13, atol=0)


def test_a_sampling_hands_its_churn_to_heun() -> None:
    sampling = Sampling("heun", 6, "linear", churn=3.0, churn_between=(0.05, 50.0), churn_noise=1.007)
    made = sampling(ideal, SeededNoise([4, 5], (1, 3, 3)))
    noise = SeededNoise([4, 5], (1, 3, 3))
    start, sigmas = noise().double() * 80, linear_sigmas(6)
    options = {"churn": 3.0, "churn_min": 0.05, "churn_max": 50.0, "churn_noise": 1.007, "noise": noise}
    assert torch.equal(made, heun(ideal, start, sigmas, **options))
    assert not torch.equal(made, heun(ideal, start, sigmas))


@each(ALL)
def test_a_sample_does_not_depend_on_the_rest_of_its_batch(sampler: Sampler) -> None:
    start, sigmas = 80 * drawn(0, 3, 1, 4, 4), karras_sigmas(6)
    noises = SeededNoise([0, 1, 2], (1, 4, 4)), SeededNoise([1], (1, 4, 4))
    takes_noise = sampler in STOCHASTIC.values()
    batch, alone = (
        sampler(ideal, some, sigmas, **{"noise": noise} if takes_noise else {})
        for some, noise in zip((start, start[1:2]), noises, strict=True)
    )
    assert torch.equal(batch[1], alone[0])
