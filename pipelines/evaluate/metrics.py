"""Measures: what every metric is made of, from the features of both sides."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from patchloom.errors import UserError
from patchloom.models.features import POOL, SPATIAL
from patchloom.models.metrics import (
    DistanceOfRows,
    Moments,
    bootstrap_interval,
    extrapolated_distance,
    gaussian_distance,
    inception_score,
    kernel_distance,
)
from patchloom.models.neighbours import Neighbourhood, neighbourhood
from patchloom.pipelines.evaluate.features import Extracted
from patchloom.pipelines.evaluate.image_sets import DatasetImages

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
FEW_SAMPLES = 10_000  # below, the bias of a Fréchet distance is of the size of what people compare
BOOTSTRAPS = 50


@dataclass
class ComparedSets:
    """Both sides of a comparison, and what several metrics need of them, computed once."""

    samples: Extracted
    reference: Extracted | None  # None: only its statistics are known
    statistics: dict[str, tuple[Tensor, Tensor]]  # given mean and covariance of the reference by output

    def gaussian(self, output: str) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the reference: given ones come before computed ones."""
        if output in self.statistics:
            return self.statistics[output]
        assert self.reference is not None
        moments = self.reference.moments(output)
        return moments.mean, moments.covariance

    @cached_property
    def sample_rows(self) -> Tensor:
        """(n, d) pool features of the samples."""
        return self.samples.rows()

    @cached_property
    def reference_rows(self) -> Tensor:
        """(n, d) pool features of the reference's images."""
        assert self.reference is not None
        return self.reference.rows()

    @cached_property
    def neighbours(self) -> Neighbourhood:
        """Who is near whom among the pool features."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return neighbourhood(self.reference_rows.to(device), self.sample_rows.to(device), NEIGHBOURS)


def _frechet(name: str, output: str) -> Callable[[ComparedSets], dict[str, Any]]:
    def measure(sides: ComparedSets) -> dict[str, Any]:
        moments = sides.samples.moments(output)
        mean, covariance = sides.gaussian(output)
        if len(mean) != len(moments.mean):
            raise UserError(
                f"the reference's statistics are {len(mean)} wide and the features of the samples {len(moments.mean)}: "
                "give a reference of the same features"
            )
        found: dict[str, Any] = {name: gaussian_distance(moments.mean, moments.covariance, mean, covariance)}
        if output == POOL and moments.count < FEW_SAMPLES:
            found |= _uncertainty(name, sides, mean, covariance)
        return found

    return measure


def _uncertainty(name: str, sides: ComparedSets, mean: Tensor, covariance: Tensor) -> dict[str, Any]:
    """How large the distance would be with ever more samples, with other ones, and with as many real images."""
    distance = DistanceOfRows(sides.sample_rows, mean, covariance)
    found: dict[str, Any] = {
        f"{name}_infinity": extrapolated_distance(distance),
        f"{name}_interval_95": list(bootstrap_interval(distance, BOOTSTRAPS)),
    }
    n = len(sides.sample_rows)
    if sides.reference is not None and len(sides.reference.images) >= 2 * n:
        real = sides.reference_rows
        order = np.random.default_rng(0).permutation(len(real))
        rest = Moments.of(real[order[n:]])
        found[f"{name}_of_real_images"] = DistanceOfRows(real, rest.mean, rest.covariance)(order[:n])
    return found


def _kid(sides: ComparedSets) -> dict[str, Any]:
    found = kernel_distance(sides.sample_rows, sides.reference_rows)
    return {"kid": found.mean, "kid_standard_error": found.standard_error, "kid_std": found.std}


def _inception_score(sides: ComparedSets) -> dict[str, Any]:
    classifier = sides.samples.features.classifier
    if classifier is None:
        raise UserError(
            f"the Inception Score needs class probabilities, and {sides.samples.features.name} has no classifier in "
            "these weights: give --features weights-inception-2015-12-05-6726825d.pth, or leave `is` out of --metrics"
        )
    mean, std = inception_score(sides.sample_rows @ classifier.T)
    return {"inception_score": mean, "inception_score_std": std}


def _precision_recall(sides: ComparedSets) -> dict[str, Any]:
    found = sides.neighbours
    return {"precision": found.precision, "recall": found.recall, "authenticity": found.authenticity,
            "nearest_distance_median": float(found.nearest_distance.median())}  # fmt: skip


def _reconstruction(sides: ComparedSets) -> dict[str, Any]:
    from patchloom.pipelines.train.autoencoder import reconstruction_quality

    assert sides.reference is not None
    ours, theirs = sides.samples.images, sides.reference.images
    if not (isinstance(ours, DatasetImages) and isinstance(theirs, DatasetImages)):
        raise UserError("psnr and ssim compare an image with its own: give latents, and the pixels they were made of")
    if len(ours) != len(theirs):
        raise UserError(f"{ours.address} has {len(ours)} rows and {theirs.address} {len(theirs)}: give the same images")
    totals, rows = {"psnr_db": 0.0, "ssim": 0.0}, 0
    for piece in ours.ranges:
        if ours.keys(piece.start, piece.stop) != theirs.keys(piece.start, piece.stop):
            raise UserError(f"{ours.address} and {theirs.address} have other keys: give the same images, in one order")
        pairs = theirs.read(piece.start, piece.stop), ours.read(piece.start, piece.stop)
        count = piece.stop - piece.start
        for key, value in reconstruction_quality(*pairs).items():
            totals[key] += value * count
        rows += count
    return {key: value / rows for key, value in totals.items()}


@dataclass(frozen=True)
class Metric:
    """How one is measured, and what it takes."""

    measure: Callable[[ComparedSets], dict[str, Any]]
    output: str | None = POOL  # of the features; None: it looks at the images themselves
    needs_images: bool = False  # of the reference; statistics alone do not do
    least_images: int = 2  # on both sides
    of_inception: bool | None = None  # True: of its features alone; False: what it is called on others


METRICS = {
    "fid": Metric(_frechet("fid", POOL), of_inception=True),
    "sfid": Metric(_frechet("sfid", SPATIAL), SPATIAL, of_inception=True),
    "kid": Metric(_kid, needs_images=True, least_images=4),
    "is": Metric(_inception_score, of_inception=True),
    "precision": Metric(_precision_recall, needs_images=True, least_images=NEIGHBOURS + 1),
    "recall": Metric(_precision_recall, needs_images=True, least_images=NEIGHBOURS + 1),
    "fd": Metric(_frechet("frechet_distance", POOL), of_inception=False),
    "psnr": Metric(_reconstruction, None, needs_images=True),
    "ssim": Metric(_reconstruction, None, needs_images=True),
}
