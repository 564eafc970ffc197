"""EMA: running averages of the weights, which are what is sampled from and registered."""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


class WeightAverage(ABC):
    """A module that follows another one; how fast is `decay`'s to say."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @abstractmethod
    def decay(self, images_seen: int, images_in_step: int) -> float:
        """The share of the old average that a step of `images_in_step`, ending at `images_seen`, keeps."""

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, images_in_step: int) -> None:
        """Move the average towards the module's parameters after a step that ended at `images_seen`."""
        share = 1 - self.decay(images_seen, images_in_step)
        averages = [average.detach() for average in self.module.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in module.parameters()], share)


class HalfLifeEMA(WeightAverage):
    """An exponential moving average whose half-life is counted in images (EDM, F.2).

    The half-life is held to `rampup_ratio` of the images seen, so that a young run is not averaged with
    its first random weights.
    """

    def __init__(self, module: nn.Module, halflife_images: float, rampup_ratio: float = 0.05) -> None:
        super().__init__(module)
        self.halflife_images, self.rampup_ratio = halflife_images, rampup_ratio

    def decay(self, images_seen: int, images_in_step: int) -> float:
        """beta = 0.5 ^ (images in the step / half-life), 0 before anything was seen."""
        halflife = min(self.halflife_images, self.rampup_ratio * images_seen)
        return float(0.5 ** (images_in_step / max(halflife, 1e-8)))


class PowerEMA(WeightAverage):
    """An average that weighs the weights at t images by t^gamma, up to now (EDM2, section 3.1).

    It needs no ramp-up, and its width stays `sigma_rel` times the length of the run. Averages of two widths,
    kept now and then, give that of any other width afterwards (`reconstruction`).
    """

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        super().__init__(module)
        self.sigma_rel, self.gamma = sigma_rel, power_of_width(sigma_rel)

    def decay(self, images_seen: int, images_in_step: int) -> float:
        """beta = (1 - images in the step / images seen) ^ (gamma + 1) (EDM2, Eq. 2)."""
        return float((1 - images_in_step / images_seen) ** (self.gamma + 1)) if images_seen else 0.0


@functools.cache
def power_of_width(sigma_rel: float) -> float:
    """gamma of the power function whose standard deviation is `sigma_rel` of the run's length (EDM2, Eq. 3).

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic whose largest real root is wanted.
    Raises ValueError outside 0 ... 0.288, the width of a plain mean.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel is {sigma_rel:g}: a width lies between 0 and 0.288, the plain mean's")
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


@dataclass(frozen=True)
class PowerProfile:
    """Which weights an average holds: those at t images with density (gamma + 1) t^gamma / T^(gamma + 1), t <= T."""

    sigma_rel: float
    images_seen: float

    def overlap(self, other: "PowerProfile") -> float:
        """The integral over t of the product of two densities, per image (EDM2, appendix C)."""
        early, late = sorted((self, other), key=lambda profile: profile.images_seen)
        a, b = power_of_width(early.sigma_rel), power_of_width(late.sigma_rel)
        ratio = early.images_seen / late.images_seen
        return float((a + 1) * (b + 1) * ratio**b / ((a + b + 1) * late.images_seen))


def reconstruction(kept: Sequence[PowerProfile], wanted: PowerProfile) -> np.ndarray:
    """How much of each kept average makes the wanted one: (N,) float64 (EDM2, section 3.2).

    The combination of the kept densities that is nearest to the wanted one in the mean square, among those
    whose shares add up to 1: what is left of a width out of reach is then a coarser average, and not a
    shrunken one. Raises ValueError where nothing was kept.
    """
    if not kept:
        raise ValueError("no average was kept: set snapshot_every_images in the recipe's ema")
    products = np.array([[one.overlap(other) for other in kept] for one in kept])
    target = np.array([one.overlap(wanted) for one in kept])
    scale = np.sqrt(np.diag(products))  # densities of unit length: far better conditioned
    system = np.zeros((len(kept) + 1, len(kept) + 1))
    system[:-1, :-1] = products / np.outer(scale, scale)
    system[:-1, -1] = system[-1, :-1] = scale.min() / scale  # the constraint and its multiplier
    solution, *_ = np.linalg.lstsq(system, np.append(target / scale, scale.min()), rcond=1e-12)
    return np.asarray(solution[:-1] / scale)


def combine(kept: Iterable[dict[str, Tensor]], shares: np.ndarray) -> dict[str, Tensor]:
    """The weighted sum of parameters by name, one average in memory at a time; summed in float64, given in float32."""
    total: dict[str, Tensor] = {}
    for parameters, share in zip(kept, shares, strict=True):
        for name, tensor in parameters.items():
            weighed = tensor.double() * float(share)
            total[name] = total[name] + weighed if name in total else weighed
    return {name: tensor.float() for name, tensor in total.items()}
