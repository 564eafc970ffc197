"""EMA: the running average of the weights, which is what is sampled from and registered."""

import copy

import torch
from torch import nn


class HalfLifeEMA:
    """An exponential moving average whose half-life is counted in images (EDM, F.2).

    The half-life is held to `rampup_ratio` of the images seen, so that a young run is not averaged with
    its first random weights.
    """

    def __init__(self, module: nn.Module, halflife_images: float, rampup_ratio: float = 0.05) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.halflife_images, self.rampup_ratio = halflife_images, rampup_ratio

    def decay(self, images_seen: int, images_in_step: int) -> float:
        """beta = 0.5 ^ (images in the step / half-life), 0 before anything was seen."""
        halflife = min(self.halflife_images, self.rampup_ratio * images_seen)
        return float(0.5 ** (images_in_step / max(halflife, 1e-8)))

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, images_in_step: int) -> None:
        """Move the average towards the module's parameters after a step that ended at `images_seen`."""
        share = 1 - self.decay(images_seen, images_in_step)
        averages = [average.detach() for average in self.module.parameters()]
        torch._foreach_lerp_(averages, [p.detach() for p in module.parameters()], share)
