"""Sampler: rows of seeds and labels in, rows with images out, in other people's pipelines."""

import inspect
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import SamplingModel, load_sampling_model
from patchloom.models.generate import Sampling, check_fit, class_number, default_labels, generate_padded, one_thread
from patchloom.pipelines.sample.options import SampleOptions, sampler_parameters
from patchloom.platform.dataset.labels import label_of
from patchloom.platform.tracking.registry import fetch_model

_one_at_a_time = threading.Lock()  # the number of torch's threads belongs to the process


def load_model_for_sampling(reference: str | Path) -> SamplingModel:
    """Fetch a model and load it on the GPU if there is one, else on the CPU."""
    return load_for_sampling(fetch_model(str(reference)).folder)


def load_for_sampling(folder: Path) -> SamplingModel:
    """Load a model folder on the GPU if there is one, else on the CPU."""
    return load_sampling_model(folder, "cuda" if torch.cuda.is_available() else "cpu")


def sample_rows(
    model: SamplingModel, seeds: Iterable[Any], labels: Iterable[Any] | None, sampling: Sampling, batch: int
) -> tuple[list[int], np.ndarray]:
    """Sample one image per seed with one thread of the CPU, which gives the bytes of `patchloom sample`.

    Args:
        model: the model.
        seeds: one seed per image.
        labels: one class per image, by name or number. None or NaN: the default class of the seed. -1: no class.
        sampling: the options of the sampler.
        batch: images per network batch.

    Returns:
        The class number of every image, and the images as (N, C, H, W) uint8.

    Raises:
        ValueError: an option does not fit the model, or the model does not know a class.
    """
    check_fit(sampling, model.card)
    numbers = [int(seed) for seed in seeds]
    if batch < 1 or any(seed < 0 for seed in numbers):
        raise ValueError(f"seeds start at 0 and the batch at 1: found {min(numbers, default=0)} and {batch}")
    classes = class_numbers(numbers, labels, model.card)
    return classes, sample_classes(model, numbers, classes, sampling, batch)


def sample_classes(
    model: SamplingModel, seeds: list[int], classes: list[int], sampling: Sampling, batch: int
) -> np.ndarray:
    """Sample one image per seed and class number, as `sample_rows` does; (N, C, H, W) uint8."""
    with _one_at_a_time, one_thread():
        return generate_padded(model, seeds, classes, batch, sampling).cpu().numpy()


def class_numbers(seeds: list[int], labels: Iterable[Any] | None, card: ModelCard) -> list[int]:
    """The class number of each seed; labels are as for `sample_rows`. Raises ValueError for an unknown class."""
    numbers = default_labels(seeds, card.sampled_classes)
    for row, value in enumerate(labels if labels is not None else ()):
        label = label_of(value, f"row {row}")
        if label is None:
            continue
        try:
            numbers[row] = class_number(label, card.class_names)
        except ValueError as error:
            raise ValueError(f"label {label} {error}") from None
    return numbers


class Sampler:
    """Samples images for rows of seeds, in batch pipelines of Ray Data.

    The bytes of an image are those of `patchloom sample` with the same options and `batch`, whatever the batch size
    of Ray Data.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model` or a folder. Every worker fetches it.
            Set `MLFLOW_TRACKING_URI` for the workers if it is not the default.
        batch: images per network batch.
        **options: options of the sampler, as for `patchloom.sample`: steps, sampler, ladder, churn, churn_between,
            churn_noise, guidance, guidance_between, size, canvas.

    Raises:
        UserError: there is no such model, or the options do not fit it.

    Example:
        import ray

        rows = ray.data.range(64).rename_columns({"id": "seed"})
        images = rows.map_batches(
            patchloom.Sampler,
            fn_constructor_args=("models:/my-model@champion",),
            fn_constructor_kwargs={"steps": 18},
            batch_size=16,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        first = images.take(1)[0]["image"]
    """

    def __init__(self, model: str | Path, *, batch: int = SampleOptions.batch, **options: Any) -> None:
        try:
            self._sampling, self._batch = Sampling(**options), batch
            self._model = load_model_for_sampling(model)
            check_fit(self._sampling, self._model.card)
        except ValueError as error:
            raise UserError(str(error)) from None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sample one image per row.

        Args:
            batch: columns `seed` and, if wanted, `label` (class by name or number; missing: all classes in turn).
                Other columns are kept.

        Returns:
            The columns of the batch and `image`: (N, H, W, C) uint8.

        Raises:
            UserError: the column `seed` is missing, or the model does not know a class.
        """
        if "seed" not in batch:
            raise UserError(f"seed: this column is missing; the batch has {', '.join(batch) or 'no columns'}")
        try:
            _, images = sample_rows(self._model, batch["seed"], batch.get("label"), self._sampling, self._batch)
        except ValueError as error:
            raise UserError(str(error)) from None
        return {**batch, "image": np.ascontiguousarray(images.transpose(0, 2, 3, 1))}


_first, _model, *_ = inspect.signature(Sampler.__init__).parameters.values()
Sampler.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # help() shows the options
    [_first, _model, *sampler_parameters()]
)
