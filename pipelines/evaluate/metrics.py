"""Metrics: how each one is computed from the features of the samples and of the reference."""

import functools
import operator
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
    BLOCK_ROWS,
    DistanceOfRows,
    FeatureRows,
    Moments,
    extrapolated_distance,
    gaussian_distance,
    inception_score,
    inception_splits,
    kernel_distance,
    mean_interval,
    row_blocks,
)
from patchloom.models.neighbours import Neighbourhood, neighbourhood
from patchloom.pipelines.evaluate.features import Extracted
from patchloom.pipelines.evaluate.image_sets import DatasetImages
from patchloom.platform.compute.devices import own_device
from patchloom.platform.records.evaluation import MetricValue

NEIGHBOURS = 3  # Kynkäänniemi et al. 2019
MOST_NEIGHBOURS = 100_000  # images of a side, by default: the time grows with the square of their number
FEW_SAMPLES = 10_000  # below, the bias of a Fréchet distance is as large as the differences that people compare


@dataclass
class ComparedSets:
    """Samples and their reference, with everything that several metrics need, computed once."""

    samples: Extracted
    reference: Extracted | None  # None where only its statistics are known
    statistics: dict[str, tuple[Tensor, Tensor]]  # mean and covariance of the reference that were given, by output

    def gaussian(self, output: str) -> tuple[Tensor, Tensor]:
        """Mean (d,) and covariance (d, d) of the reference; given ones take precedence over computed ones."""
        if output in self.statistics:
            return self.statistics[output]
        assert self.reference is not None
        moments = self.reference.moments(output)
        return moments.mean, moments.covariance

    @cached_property
    def sample_rows(self) -> FeatureRows:
        """(n, d) pool features of the samples; many are in a file, and read when they are needed."""
        return self.samples.rows()

    @cached_property
    def reference_rows(self) -> FeatureRows:
        """(n, d) pool features of the reference; many are in a file, and read when they are needed."""
        assert self.reference is not None
        return self.reference.rows()

    @cached_property
    def neighbours(self) -> Neighbourhood:
        """Nearest neighbours among the pool features."""
        return neighbourhood(self.reference_rows, self.sample_rows, NEIGHBOURS, device=own_device())


def _frechet(name: str, output: str) -> Callable[[ComparedSets], dict[str, MetricValue]]:
    def measure(sets: ComparedSets) -> dict[str, MetricValue]:
        moments = sets.samples.moments(output)
        mean, covariance = sets.gaussian(output)
        if len(mean) != len(moments.mean):
            raise UserError(
                f"the statistics of the reference have {len(mean)} values and the features of the samples have "
                f"{len(moments.mean)}: give statistics of the same features"
            )
        measured: dict[str, MetricValue] = {name: gaussian_distance(moments.mean, moments.covariance, mean, covariance)}
        if output == POOL and moments.count < FEW_SAMPLES:
            measured |= _uncertainty(name, sets, mean, covariance)
        return measured

    return measure


def _uncertainty(name: str, sets: ComparedSets, mean: Tensor, covariance: Tensor) -> dict[str, MetricValue]:
    """The distance with unlimited samples, the interval of the mean over draws, and that of as many real images."""
    distance = DistanceOfRows(sets.sample_rows[:], mean, covariance)
    found: dict[str, MetricValue] = {}
    interval = mean_interval(distance)
    if interval is not None:
        found[f"{name}_interval_95"] = list(interval)
    infinity = extrapolated_distance(distance)
    if infinity is not None:
        found[f"{name}_infinity"] = infinity
    n = len(sets.sample_rows)
    if sets.reference is not None and len(sets.reference.images) >= 2 * n:
        real = sets.reference_rows
        order = np.random.default_rng(0).permutation(len(real))
        rest = _moments_at(real, order[n:])
        chosen = order[:n]
        if not isinstance(real, Tensor):
            real, chosen = real[chosen], np.arange(n)
        found[f"{name}_of_real_images"] = DistanceOfRows(real, rest.mean, rest.covariance)(chosen)
    return found


def _moments_at(rows: FeatureRows, chosen: np.ndarray) -> Moments:
    """The moments of the rows at these positions; many are read in their order, block by block."""
    if len(rows) <= BLOCK_ROWS:
        return Moments.of(rows[chosen])
    is_chosen, first = np.zeros(len(rows), bool), 0
    is_chosen[chosen] = True
    parts = []
    for block in row_blocks(rows):
        parts.append(Moments.of(block[torch.from_numpy(is_chosen[first : first + len(block)])]))
        first += len(block)
    return functools.reduce(operator.add, parts)


def _kid(sets: ComparedSets) -> dict[str, MetricValue]:
    found = kernel_distance(sets.sample_rows, sets.reference_rows)
    return {"kid": found.mean, "kid_standard_error": found.standard_error, "kid_std": found.std}


def _inception_score(sets: ComparedSets) -> dict[str, MetricValue]:
    classifier = sets.samples.features.classifier
    if classifier is None:
        raise UserError(
            f"the Inception Score needs class probabilities, and these weights of {sets.samples.features.name} have no "
            "classifier: give --features weights-inception-2015-12-05-6726825d.pth, or remove `is` from --metrics"
        )
    rows = sets.sample_rows
    mean, std = inception_score(rows @ classifier.T if isinstance(rows, Tensor) else _Logits(rows, classifier))
    splits = float(inception_splits(len(sets.sample_rows)))
    deviation: dict[str, MetricValue] = {} if std is None else {"inception_score_std": std}
    return {"inception_score": mean, **deviation, "inception_score_splits": splits}


@dataclass(frozen=True)
class _Logits:
    """The class logits of many features, computed when they are needed."""

    rows: FeatureRows
    classifier: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Tensor:
        return self.rows[rows] @ self.classifier.T


def _precision_recall(sets: ComparedSets) -> dict[str, MetricValue]:
    found = sets.neighbours
    return {"precision": found.precision, "recall": found.recall, "authenticity": found.authenticity,
            "nearest_distance_median": float(found.nearest_distance.median())}  # fmt: skip


def _reconstruction(sets: ComparedSets) -> dict[str, MetricValue]:
    from patchloom.pipelines.train.autoencoder import SSIM_WINDOW, reconstruction_quality

    assert sets.reference is not None
    samples, reference = sets.samples.images, sets.reference.images
    if not (isinstance(samples, DatasetImages) and isinstance(reference, DatasetImages)):
        raise UserError("psnr and ssim compare a dataset of latents with the dataset of pixels it encodes: give both")
    if len(samples) != len(reference):
        counts = f"{samples.address} has {len(samples)} rows and {reference.address} has {len(reference)}"
        raise UserError(f"{counts}: give the same images")
    totals, rows = {"psnr_db": 0.0, "ssim": 0.0}, 0
    for piece in samples.ranges:
        if samples.keys(piece.start, piece.stop) != reference.keys(piece.start, piece.stop):
            both = f"{samples.address} and {reference.address}"
            raise UserError(f"{both} have different keys: give the same images in the same order")
        pairs = reference.read(piece.start, piece.stop), samples.read(piece.start, piece.stop)
        count = piece.stop - piece.start
        quality = reconstruction_quality(*pairs)
        totals["psnr_db"] += quality.psnr_db * count
        totals["ssim"] += quality.ssim * count
        rows += count
    return {**{key: value / rows for key, value in totals.items()}, "ssim_window": float(SSIM_WINDOW)}


@dataclass(frozen=True)
class Metric:
    """How a metric is measured, and what it needs. A new metric is one entry of `METRICS`."""

    measure: Callable[[ComparedSets], dict[str, MetricValue]]
    output: str | None = POOL  # of the feature network; None: it compares the images themselves
    needs_images: bool = False  # of the reference; statistics are not enough
    least_images: int = 2  # in each set
    most_images: int | None = None  # in each set, unless the metric is chosen by name
    of_inception: bool | None = None  # True: only on Inception; False: only on other features


METRICS = {
    "fid": Metric(_frechet("fid", POOL), of_inception=True),
    "sfid": Metric(_frechet("sfid", SPATIAL), SPATIAL, of_inception=True),
    "kid": Metric(_kid, needs_images=True, least_images=4),
    "is": Metric(_inception_score, of_inception=True),
    "precision": Metric(_precision_recall, needs_images=True, least_images=NEIGHBOURS + 1, most_images=MOST_NEIGHBOURS),
    "recall": Metric(_precision_recall, needs_images=True, least_images=NEIGHBOURS + 1, most_images=MOST_NEIGHBOURS),
    "fd": Metric(_frechet("frechet_distance", POOL), of_inception=False),
    "psnr": Metric(_reconstruction, None, needs_images=True),
    "ssim": Metric(_reconstruction, None, needs_images=True),
}
