"""Sampler: rows of seeds and labels in, rows with images out, in other people's pipelines."""

import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import SamplingModel, load_sampling_model
from patchloom.models.generate import (
    Sampling,
    check_fit,
    class_number,
    default_labels,
    generate_padded,
    image_size,
)
from patchloom.models.precision import fixed_arithmetic
from patchloom.pipelines.sample.options import DEFAULT_BATCH, sampler_parameters
from patchloom.platform.compute.devices import own_device
from patchloom.platform.dataset.labels import label_of
from patchloom.platform.tracking.registry import fetch_model

ERROR_CHOICES = ("raise", "column")

_one_at_a_time = threading.Lock()  # the settings of torch belong to the process


def load_model_for_sampling(reference: str | Path) -> SamplingModel:
    """Fetch a model and load it on the device of this process."""
    return load_for_sampling(fetch_model(str(reference)).folder)


def load_for_sampling(folder: Path) -> SamplingModel:
    """Load a model folder on the device of this process."""
    return load_sampling_model(folder, own_device())


def sample_rows(
    model: SamplingModel,
    seeds: Iterable[Any],
    labels: Iterable[Any] | None,
    sampling: Sampling,
    batch: int,
    check: Callable[[], None] | None = None,
) -> tuple[list[int], np.ndarray]:
    """Sample one image per seed with one thread of the CPU, which gives the bytes of `patchloom sample`.

    Args:
        model: the model.
        seeds: one seed per image.
        labels: one class per image, by name or number. None or NaN: the default class of the seed. -1: no class.
        sampling: the options of the sampler.
        batch: images per network batch.
        check: called before each evaluation of the network; ends the sampling by an exception.

    Returns:
        The class number of every image, and the images as (N, C, H, W) uint8.

    Raises:
        ValueError: an option does not fit the model, a seed is not a whole number, or the model does not know a class.
    """
    refuse_condition(model.card)
    rows = checked_rows(seeds, labels, model.card)
    for number, row in enumerate(rows):
        if row.error:
            raise ValueError(f"row {number}: {row.error}")
    return [row.label for row in rows], sample_checked(model, rows, sampling, batch, check)


def refuse_condition(card: ModelCard) -> None:
    """Raise ValueError for a model with a condition, where only seeds and classes can be given."""
    if card.condition is not None:
        raise ValueError(
            f"this model needs a condition image ({card.condition.kind}) for each seed, which cannot be given here: "
            "use `patchloom sample --conditions`, or patchloom.Sampler with a column `condition`"
        )


@dataclass(frozen=True)
class CheckedRow:
    """The seed and the class number of an image, or what is wrong with them."""

    seed: int = -1
    label: int = -1
    error: str = ""


def checked_rows(seeds: Iterable[Any], labels: Iterable[Any] | None, card: ModelCard) -> list[CheckedRow]:
    """Check seeds and labels, which are as for `sample_rows`, one by one."""
    pairs, sampled = zip_longest(seeds, labels if labels is not None else ()), card.sampled_classes
    return [_checked_row(seed, label, card, sampled) for seed, label in pairs]


def _checked_row(value: Any, label: Any, card: ModelCard, sampled: Sequence[int]) -> CheckedRow:
    try:
        seed = whole_seed(value)
    except ValueError as error:
        return CheckedRow(error=str(error))
    try:
        return CheckedRow(seed, _class_of(label, "this row", default_labels([seed], sampled)[0], card))
    except (ValueError, UserError) as error:
        return CheckedRow(error=f"seed {seed}: {error}")


def whole_seed(value: Any) -> int:
    """A seed of a table. Raises ValueError unless it is a whole number from 0 to 2^64 - 1."""
    try:
        seed = int(value)
        if (seed == value or isinstance(value, str)) and 0 <= seed < 2**64:
            return seed
    except (TypeError, ValueError, OverflowError):  # None, a text, infinity
        pass
    raise ValueError(f"seed {value} is not a whole number from 0 to 2^64 - 1")


def sample_checked(
    model: SamplingModel,
    rows: list[CheckedRow],
    sampling: Sampling,
    batch: int,
    check: Callable[[], None] | None = None,
    conditions: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """Sample one image per row, with a condition (K, H, W) per row if the model needs one.

    Returns:
        (N, C, H, W) uint8, black for a row with an error.
    """
    check_fit(sampling, model.card)
    if batch < 1:
        raise ValueError(f"batch: {batch} is less than 1")
    good = [number for number, row in enumerate(rows) if not row.error]
    seeds, classes = [rows[number].seed for number in good], [rows[number].label for number in good]
    shown = None
    if conditions is not None:
        empty = np.empty((0, *conditions[0].shape)) if conditions else np.empty(0)
        shown = np.stack([conditions[number] for number in good]) if good else empty
    sampled = sample_classes(model, seeds, classes, sampling, batch, check, shown)
    images = np.zeros((len(rows), *sampled.shape[1:]), np.uint8)
    images[good] = sampled
    return images


def sample_classes(
    model: SamplingModel,
    seeds: list[int],
    classes: list[int],
    sampling: Sampling,
    batch: int,
    check: Callable[[], None] | None = None,
    conditions: np.ndarray | None = None,
) -> np.ndarray:
    """Sample one image per seed, class number and condition, as `sample_rows` does; (N, C, H, W) uint8."""
    shown = None if conditions is None else torch.from_numpy(conditions)
    with _one_at_a_time, fixed_arithmetic():
        return generate_padded(model, seeds, classes, batch, sampling, check=check, condition=shown).cpu().numpy()


def class_numbers(seeds: list[int], labels: Iterable[Any] | None, card: ModelCard) -> list[int]:
    """The class number of each seed; labels are as for `sample_rows`. Raises ValueError for an unknown class."""
    numbers = default_labels(seeds, card.sampled_classes)
    for row, value in enumerate(labels if labels is not None else ()):
        numbers[row] = _class_of(value, f"row {row}", numbers[row], card)
    return numbers


def _class_of(value: Any, where: str, default: int, card: ModelCard) -> int:
    label = label_of(value, where)
    if label is None:
        return default
    try:
        return class_number(label, card.class_names)
    except ValueError as error:
        raise ValueError(f"label {label} {error}") from None


class Sampler:
    """Samples images for rows of seeds, in batch pipelines of Ray Data.

    The bytes of an image are those of `patchloom sample` with the same options and `batch`, whatever the batch size
    of Ray Data.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model` or a folder. Every worker fetches it.
            Set `MLFLOW_TRACKING_URI` for the workers if it is not the default.
        batch: images per network batch.
        on_error: what happens to a row with a wrong seed or a class that the model does not know. "raise" ends the
            pipeline. "column" adds the column `error`: what is wrong, or an empty text. The image of a wrong row is
            black.
        **options: options of the sampler, as for `patchloom.sample`: steps, sampler, ladder, churn, churn_between,
            churn_noise, guidance, guidance_between, size, canvas, precision.

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

    def __init__(
        self,
        model: str | Path,
        *,
        batch: int = DEFAULT_BATCH,
        on_error: Literal["raise", "column"] = "raise",
        **options: Any,
    ) -> None:
        try:
            if on_error not in ERROR_CHOICES:
                raise ValueError(f"on_error: {on_error!r} is not one of {', '.join(ERROR_CHOICES)}")
            self._sampling, self._batch, self._on_error = Sampling(**options), batch, on_error
            self._model = load_model_for_sampling(model)
            check_fit(self._sampling, self._model.card)
        except ValueError as error:
            raise UserError(str(error)) from None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Sample one image per row.

        Args:
            batch: columns `seed` and, if wanted, `label` (class by name or number; missing: all classes in turn). For a
                model with a condition also `condition`: (H, W) or (H, W, K) arrays of the size of the samples and the
                type of the dataset's conditions. Other columns are kept.

        Returns:
            The columns of the batch, `image` as (N, H, W, C) uint8 and, with `on_error="column"`, `error`.

        Raises:
            UserError: the column `seed` is missing, or a row is wrong and `on_error` is "raise".
        """
        if "seed" not in batch:
            raise UserError(f"seed: this column is missing; the batch has {', '.join(batch) or 'no columns'}")
        rows = checked_rows(batch["seed"], batch.get("label"), self._model.card)
        conditions = None
        if self._model.card.condition is not None:
            rows, conditions = self._with_conditions(rows, batch)
        errors = [row.error for row in rows]
        if self._on_error == "raise" and any(errors):
            raise UserError(next(filter(None, errors)))
        try:
            images = sample_checked(self._model, rows, self._sampling, self._batch, conditions=conditions)
        except ValueError as error:
            raise UserError(str(error)) from None
        found = {"error": np.array(errors, dtype=object)} if self._on_error == "column" else {}
        return {**batch, "image": np.ascontiguousarray(images.transpose(0, 2, 3, 1)), **found}

    def _with_conditions(
        self, rows: list[CheckedRow], batch: dict[str, np.ndarray]
    ) -> tuple[list[CheckedRow], list[np.ndarray]]:
        """The rows, with an error where the condition does not fit, and the (K, H, W) conditions."""
        card, (height, width) = self._model.card.condition, image_size(self._model.card, self._sampling)
        assert card is not None
        if "condition" not in batch:
            raise UserError(
                f"condition: this column is missing, and the model needs a condition ({card.kind}) per seed"
            )
        shape, found = (height, width, card.channels), list[np.ndarray]()
        for number, value in enumerate(batch["condition"]):
            values = np.asarray(value)
            values = values[:, :, None] if values.ndim == 2 else values
            if values.shape != shape or values.dtype != card.dtype:
                problem = (
                    f"condition: is {values.dtype} of shape {values.shape}, and must be {card.dtype} of shape {shape}"
                )
                rows[number] = replace(rows[number], error=rows[number].error or problem)
                values = np.zeros(shape, card.dtype)
            found.append(values.transpose(2, 0, 1))
        return rows, found


_own = inspect.signature(Sampler.__init__).parameters
Sampler.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # help() shows the options
    [_own["self"], _own["model"], *sampler_parameters(), _own["on_error"]]
)
