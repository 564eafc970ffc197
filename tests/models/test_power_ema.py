"""Power-function averages weigh as EDM2 says, and two of them give one of any other width afterwards."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import Tensor, nn

from patchloom.models.ema import PowerEMA, PowerProfile, combine, power_of_width, reconstruction

WIDTHS = (0.03, 0.05, 0.06, 0.075, 0.10, 0.12, 0.15, 0.20, 0.25)
KEPT = (0.05, 0.10)


def width_of_power(gamma: float) -> float:
    """EDM2, Eq. 3: the standard deviation of t^gamma on [0, 1]."""
    return ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5


def vector(values: np.ndarray) -> nn.Linear:
    layer = nn.Linear(len(values), 1, bias=False).double()
    layer.weight = nn.Parameter(torch.from_numpy(values)[None].clone())
    return layer


def value_of(average: PowerEMA) -> np.ndarray:
    (parameter,) = average.module.parameters()
    return parameter[0].numpy().copy()


# Widths and powers


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_powers_are_those_that_edm2_names(sigma_rel: float, gamma: float) -> None:
    assert power_of_width(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.5, 1.0, 6.94, 16.97, 50.0, 300.0])
def test_the_power_of_a_powers_width_is_that_power(gamma: float) -> None:
    assert power_of_width(width_of_power(gamma)) == pytest.approx(gamma, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.005, 0.01, 0.05, 0.1, 0.2, 0.27])
def test_the_width_is_the_densitys_standard_deviation(sigma_rel: float) -> None:
    gamma = power_of_width(sigma_rel)
    moments = [integrate.quad(lambda t, k=k: (gamma + 1) * t ** (gamma + k), 0, 1)[0] for k in range(3)]
    assert moments[0] == pytest.approx(1)
    assert (moments[2] - moments[1] ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-5)


def test_the_widest_average_is_the_plain_mean() -> None:
    assert power_of_width(12**-0.5) == pytest.approx(0, abs=1e-6)
    layer = vector(np.zeros(1))
    average = PowerEMA(layer, 12**-0.5)
    for step, value in enumerate((3.0, 5.0, 10.0), start=1):
        average.update(vector(np.array([value])), 64 * step, 64)
    assert value_of(average) == pytest.approx([6.0])


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.289, 1.0, math.nan])
def test_a_width_outside_0_and_that_of_the_mean_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.288"):
        power_of_width(sigma_rel)
    with pytest.raises(ValueError, match="sigma_rel"):
        PowerEMA(nn.Linear(1, 1), sigma_rel)


# Tracking


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.10, 0.25])
@pytest.mark.parametrize("equal", [True, False])
def test_the_average_weighs_every_step_by_the_power_of_its_images(sigma_rel: float, equal: bool) -> None:
    draws = np.random.default_rng(0)
    values = draws.normal(size=(60, 4))
    in_step = np.full(60, 64) if equal else draws.choice([64, 128, 256], size=60)
    seen = np.cumsum(in_step)
    average = PowerEMA(vector(np.full(4, 1e6)), sigma_rel)  # the first weights leave no trace
    for value, total, images in zip(values, seen, in_step, strict=True):
        average.update(vector(value), int(total), int(images))
    power = power_of_width(sigma_rel) + 1
    edges = np.concatenate([[0.0], seen]) / seen[-1]
    weights = edges[1:] ** power - edges[:-1] ** power
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(value_of(average), weights @ values, rtol=0, atol=1e-10)


def test_the_first_step_takes_the_weights_as_they_are() -> None:
    average = PowerEMA(vector(np.array([9.0])), 0.1)
    assert average.decay(64, 64) == 0
    assert average.decay(0, 0) == 0
    average.update(vector(np.array([2.0])), 64, 64)
    assert value_of(average) == pytest.approx([2.0])


def test_a_longer_run_forgets_more_slowly() -> None:
    average = PowerEMA(vector(np.zeros(1)), 0.1)
    decays = [average.decay(seen, 64) for seen in (64, 640, 6_400, 64_000)]
    assert decays == sorted(decays)
    assert decays[1] == pytest.approx(0.9 ** (6.9376 + 1), rel=1e-4)


# Profiles


@pytest.mark.parametrize(
    ("one", "other"),
    [((0.05, 1.0), (0.05, 1.0)), ((0.05, 1.0), (0.10, 1.0)), ((0.10, 0.5), (0.05, 1.0)), ((0.05, 0.9), (0.10, 0.3)),
     ((0.20, 1000.0), (0.05, 250.0)), ((0.27, 3.0), (0.27, 2.0)), ((0.03, 0.97), (0.03, 1.0))],
)  # fmt: skip
def test_an_overlap_is_the_integral_of_the_product(one: tuple[float, float], other: tuple[float, float]) -> None:
    a, b = power_of_width(one[0]), power_of_width(other[0])

    def product(t: float) -> float:
        first = (a + 1) * (t / one[1]) ** a / one[1]
        return first * (b + 1) * (t / other[1]) ** b / other[1]

    wanted, _ = integrate.quad(product, 0, min(one[1], other[1]))
    assert PowerProfile(*one).overlap(PowerProfile(*other)) == pytest.approx(wanted, rel=1e-6)
    assert PowerProfile(*other).overlap(PowerProfile(*one)) == pytest.approx(wanted, rel=1e-6)


# Reconstruction


@dataclass
class Run:
    """A run whose averages were tracked at every width and kept at two, now and then."""

    kept: list[PowerProfile]
    snapshots: list[dict[str, Tensor]]
    tracked: list[dict[float, np.ndarray]]  # at each time of keeping
    times: list[int]

    def rebuilt(self, sigma_rel: float, images: int) -> np.ndarray:
        shares = reconstruction(self.kept, PowerProfile(sigma_rel, images))
        return combine(self.snapshots, shares)["weight"][0].numpy().astype(float)


@pytest.fixture(scope="module", params=[16, 32])
def run(request: pytest.FixtureRequest) -> Run:
    """1200 steps of six weights that move smoothly, wander, and shake; batches are of unequal size."""
    times, steps = request.param, 1200
    draws = np.random.default_rng(times)
    in_step = draws.choice([64, 128, 256], size=steps)
    seen = np.cumsum(in_step)
    t = seen / seen[-1]
    smooth = np.stack([np.sin(3 * t), np.log(t + 0.02), t**2, np.cos(9 * t), np.exp(-5 * t), t], axis=1)
    wander = np.cumsum(draws.normal(size=(steps, 6)), axis=0) / steps**0.5
    values = smooth + 0.3 * wander + 0.2 * draws.normal(size=(steps, 6))
    averages = {width: PowerEMA(vector(values[0]), width) for width in WIDTHS}
    found = Run([], [], [], [])
    for step in range(steps):
        layer = vector(values[step])
        for average in averages.values():
            average.update(layer, int(seen[step]), int(in_step[step]))
        if (step + 1) * times % steps < times:
            found.times.append(int(seen[step]))
            found.tracked.append({width: value_of(average) for width, average in averages.items()})
            for width in KEPT:
                found.kept.append(PowerProfile(width, int(seen[step])))
                found.snapshots.append({"weight": torch.from_numpy(found.tracked[-1][width])[None]})
    assert len(found.kept) == 2 * times
    return found


# errors over the distance between averages of 0.05 and 0.20, as measured, times about three; at 16 and at 32 times
@pytest.mark.parametrize(
    ("width", "within"),
    [(0.03, (2e-2, 4e-3)), (0.06, (1e-3, 2e-4)), (0.075, (1e-3, 2e-4)), (0.12, (1e-3, 2e-4)), (0.15, (2e-3, 2e-4)),
     (0.20, (2e-2, 4e-3)), (0.25, (0.2, 0.1))],
)  # fmt: skip
def test_an_average_of_another_width_is_rebuilt_from_the_two_that_were_kept(
    run: Run, width: float, within: tuple[float, float]
) -> None:
    tracked = run.tracked[-1]
    spread = float(np.abs(tracked[0.20] - tracked[0.05]).max())
    assert spread > 0.3
    error = float(np.abs(run.rebuilt(width, run.times[-1]) - tracked[width]).max())
    assert error < spread * within[len(run.times) == 32]
    assert error < 0.5 * min(float(np.abs(tracked[width] - tracked[other]).max()) for other in WIDTHS if other != width)


@pytest.mark.parametrize("width", KEPT)
def test_a_kept_average_comes_back_at_the_times_at_which_it_was_kept(run: Run, width: float) -> None:
    for number in (0, 1, len(run.times) // 2, -1):
        rebuilt = run.rebuilt(width, run.times[number])
        np.testing.assert_allclose(rebuilt, run.tracked[number][width], rtol=0, atol=1e-6)


def test_an_average_of_half_way_is_rebuilt_too(run: Run) -> None:
    middle = len(run.times) // 2 - 1
    tracked = run.tracked[middle]
    spread = float(np.abs(tracked[0.20] - tracked[0.05]).max())
    assert np.abs(run.rebuilt(0.075, run.times[middle]) - tracked[0.075]).max() < 0.01 * spread


@pytest.mark.parametrize("width", [0.05, 0.06, 0.075, 0.10, 0.12, 0.15])
def test_the_shares_of_a_rebuilt_average_add_up_to_one(run: Run, width: float) -> None:
    shares = reconstruction(run.kept, PowerProfile(width, run.times[-1]))
    assert shares.dtype == np.float64 and shares.shape == (len(run.kept),)
    assert shares.sum() == pytest.approx(1, abs=1e-3)


def test_one_kept_average_gives_itself_and_the_order_of_many_does_not_matter() -> None:
    only = PowerProfile(0.1, 500.0)
    assert reconstruction([only], only).tolist() == pytest.approx([1.0])
    kept = [PowerProfile(width, 100.0 * time) for time in range(1, 9) for width in KEPT]
    wanted = PowerProfile(0.075, 800.0)
    np.testing.assert_allclose(reconstruction(kept, wanted), reconstruction(kept[::-1], wanted)[::-1], atol=1e-8)


def test_a_profile_that_was_kept_twice_is_harmless() -> None:
    kept = [PowerProfile(width, 100.0 * time) for time in range(1, 9) for width in KEPT]
    shares = reconstruction([*kept, kept[-1]], kept[-1])
    assert shares[[-1, -2]].sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(shares).max() < 2


def test_reconstruction_without_saved_averages_is_refused() -> None:
    with pytest.raises(ValueError, match="snapshot_every_images"):
        reconstruction([], PowerProfile(0.1, 100.0))


# Sums


def test_a_combination_is_the_weighted_sum_of_every_parameter() -> None:
    kept = [{"a": torch.full((2, 3), value), "b": torch.arange(4.0) * value} for value in (1.0, 10.0, 100.0)]
    found = combine(iter(kept), np.array([0.5, -0.25, 2.0]))
    assert found["a"].tolist() == [[198.0] * 3] * 2
    assert found["b"].tolist() == [0.0, 198.0, 396.0, 594.0]
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_a_combination_is_summed_in_float64() -> None:
    kept = [{"a": torch.tensor([1e8])}, {"a": torch.tensor([1.0])}, {"a": torch.tensor([1e8])}]
    assert combine(kept, np.array([1.0, 1.0, -1.0]))["a"].tolist() == [1.0]  # float32 would give 0
    third = 1 / 3  # not a float32
    assert combine([{"a": torch.tensor([3e7])}] * 2, np.array([third, -0.25]))["a"].tolist() == [2.5e6]


def test_averages_and_shares_that_differ_in_number_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        combine([{"a": torch.ones(1)}], np.ones(2))


@pytest.mark.parametrize(("times", "width"), [(1, 0.25), (4, 0.25), (4, 0.01), (32, 0.2)])
def test_coefficients_sum_to_1_for_widths_out_of_reach(times: int, width: float) -> None:
    kept = [PowerProfile(sigma_rel, 1000.0 * (t + 1) / times) for t in range(times) for sigma_rel in (0.05, 0.10)]
    assert reconstruction(kept, PowerProfile(width, 1000.0)).sum() == pytest.approx(1, abs=1e-9)
