"""EMA: running averages of the weights. The averages are sampled from and registered."""

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


class WeightAverage(ABC):
    """A running average of the parameters of a module, with its newest buffers. Subclasses define the decay."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @abstractmethod
    def decay(self, images_seen: int, images_in_step: int) -> float:
        """The share of the old average that remains after a step.

        Args:
            images_seen: counted images at the end of the step.
            images_in_step: counted images of the step.
        """

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, images_in_step: int) -> None:
        """Update the average after a step; arguments as for `decay`."""
        share = 1 - self.decay(images_seen, images_in_step)
        averages = [average.detach() for average in self.module.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in module.parameters()], share)
        self._copy_buffers(module)

    def _copy_buffers(self, module: nn.Module) -> None:
        """Take over the buffers as they are, such as the statistics of a BatchNorm. Integers have no average."""
        copies = dict(self.module.named_buffers())
        for name, buffer in module.named_buffers():
            if name in copies:
                copies[name].resize_as_(buffer).copy_(buffer)  # a buffer may grow


class HalfLifeEMA(WeightAverage):
    """An exponential moving average with a half-life in images (EDM, F.2).

    Args:
        module: the module to average.
        halflife_images: the half-life, in counted images.
        rampup_ratio: the half-life is at most this share of the images seen, so that early averages do not contain the
            random initial weights.
    """

    def __init__(self, module: nn.Module, halflife_images: float, rampup_ratio: float = 0.05) -> None:
        super().__init__(module)
        self.halflife_images, self.rampup_ratio = halflife_images, rampup_ratio

    def decay(self, images_seen: int, images_in_step: int) -> float:
        """beta = 0.5 ^ (images in the step / half-life); 0 at the start."""
        halflife = min(self.halflife_images, self.rampup_ratio * images_seen)
        return float(0.5 ** (images_in_step / max(halflife, 1e-8)))


class PowerEMA(WeightAverage):
    """An average with the weight t^gamma for the parameters at t images (EDM2, section 3.1).

    It needs no ramp-up: its width is always `sigma_rel` times the length of the run. From saved averages of two widths,
    `reconstruction` makes an average of any other width after the training.

    Args:
        module: the module to average.
        sigma_rel: relative width, above 0 and at most 0.288.
    """

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        super().__init__(module)
        self.sigma_rel, self.gamma = sigma_rel, power_of_width(sigma_rel)

    def decay(self, images_seen: int, images_in_step: int) -> float:
        """beta = (1 - images in the step / images seen) ^ (gamma + 1) (EDM2, Eq. 2)."""
        return float((1 - images_in_step / images_seen) ** (self.gamma + 1)) if images_seen else 0.0


@functools.cache
def power_of_width(sigma_rel: float) -> float:
    """The exponent gamma of the power function with the relative width `sigma_rel` (EDM2, Eq. 3).

    It is the largest real root of the cubic sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    Raises:
        ValueError: `sigma_rel` is not above 0 and at most 0.288, the width of the mean of all weights.
    """
    if not 0 < sigma_rel <= 12**-0.5:
        raise ValueError(f"sigma_rel: {sigma_rel:g} is not between 0 and 0.288")
    t = sigma_rel**-2
    roots = np.roots([1, 7, 16 - t, 12 - t])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-6))


@dataclass(frozen=True)
class PowerProfile:
    """The weights in an average: density (gamma + 1) t^gamma / T^(gamma + 1) at t images, up to T.

    Args:
        sigma_rel: relative width.
        images_seen: T, counted images.
    """

    sigma_rel: float
    images_seen: float

    def overlap(self, other: "PowerProfile") -> float:
        """The integral of the product of two densities over t (EDM2, appendix C)."""
        early, late = sorted((self, other), key=lambda profile: profile.images_seen)
        a, b = power_of_width(early.sigma_rel), power_of_width(late.sigma_rel)
        ratio = early.images_seen / late.images_seen
        return float((a + 1) * (b + 1) * ratio**b / ((a + b + 1) * late.images_seen))


def reconstruction(kept: Sequence[PowerProfile], wanted: PowerProfile) -> np.ndarray:
    """The coefficients of saved averages that approximate another average (EDM2, section 3.2).

    The combination minimises the mean squared difference of the densities, among those whose coefficients sum to 1.
    So a width that cannot be reached gives a wider average, not smaller weights.

    Args:
        kept: profiles of the saved averages.
        wanted: profile of the average to make.

    Returns:
        (N,) float64.

    Raises:
        ValueError: `kept` is empty.
    """
    if not kept:
        raise ValueError("no averages were saved: set ema.snapshot_every_images in the recipe")
    products = np.array([[one.overlap(other) for other in kept] for one in kept])
    target = np.array([one.overlap(wanted) for one in kept])
    scale = np.sqrt(np.diag(products))  # normalised densities, for a better condition number
    system = np.zeros((len(kept) + 1, len(kept) + 1))
    system[:-1, :-1] = products / np.outer(scale, scale)
    system[:-1, -1] = system[-1, :-1] = scale.min() / scale  # the constraint and its multiplier
    solution, *_ = np.linalg.lstsq(system, np.append(target / scale, scale.min()), rcond=1e-12)
    return np.asarray(solution[:-1] / scale)


def combine(kept: Iterable[dict[str, Tensor]], shares: np.ndarray) -> dict[str, Tensor]:
    """The weighted sum of averages, float32. It is computed in float64 with one average in memory at a time.

    Args:
        kept: tensors (any shape) by name, of each average.
        shares: (N,) coefficients.
    """
    total: dict[str, Tensor] = {}
    for parameters, share in zip(kept, shares, strict=True):
        for name, tensor in parameters.items():
            weighed = tensor.double() * float(share)
            total[name] = total[name] + weighed if name in total else weighed
    return {name: tensor.float() for name, tensor in total.items()}
