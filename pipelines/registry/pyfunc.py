"""Pyfunc: a registered model as MLflow's own users load and serve it."""

import base64
import threading
from dataclasses import fields
from typing import Any

import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from patchloom.models.checkpoints import load_whole_model
from patchloom.models.generate import Sampling, check_fit, class_number, default_labels, generate_padded, one_thread
from patchloom.pipelines.pages.pictures import png_bytes
from patchloom.platform.tracking.registry import MODEL_FOLDER

COMPUTE_BATCH = 8  # that of `patchloom sample`, so that both give the same bytes
PAIRS = {"size": DataType.long, "churn_between": DataType.double, "guidance_between": DataType.double}
SCALARS = {str: DataType.string, int: DataType.long, float: DataType.double}


def signature() -> ModelSignature:
    """In: seed and, if wanted, label (a class by name or number). Out: seed, label, png (base64).

    Parameters: every option of `Sampling`, pairs as lists of two numbers (none: an empty one), and the compute batch.
    """
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "seed"), ColSpec(AnyType(), "label", required=False)]),
        outputs=Schema([
            ColSpec(DataType.long, "seed"),
            ColSpec(DataType.long, "label"),
            ColSpec(DataType.string, "png"),
        ]),
        params=ParamSchema([_parameter(field.name, field.default) for field in fields(Sampling)]
                           + [ParamSpec("batch", DataType.long, COMPUTE_BATCH)]),
    )  # fmt: skip


def _parameter(name: str, default: Any) -> ParamSpec:
    if name in PAIRS:
        return ParamSpec(name, PAIRS[name], [], (-1,))
    return ParamSpec(name, SCALARS[type(default)], default)


def input_example(class_names: list[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Two seeds, of a class each where there are classes, and parameters."""
    table = pd.DataFrame({"seed": [0, 1]})
    if class_names:
        table["label"] = [class_names[0], class_names[-1]]
    return table, {"steps": 18, "sampler": "heun"}


class SamplerModel(PythonModel):
    """Samples images for a table of seeds."""

    def load_context(self, context: Any) -> None:
        """Build the model from its folder, once its checksum was seen to be right; nothing is unpickled."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_whole_model(context.artifacts[MODEL_FOLDER], device)
        self._alone = threading.Lock()  # a server's requests come in threads, and the number of torch's is global

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """`seed` (and `label`) columns -> seed, label and the PNG as base64 text, the bytes of `patchloom sample`.

        Raises MlflowException (400 over HTTP) for options that do not fit, or a class that is unknown.
        """
        options = dict(params or {})
        batch = int(options.pop("batch", COMPUTE_BATCH))
        seeds = [int(seed) for seed in model_input["seed"]]
        try:
            sampling = Sampling(**{name: _value(name, value) for name, value in options.items()})
            check_fit(sampling, self.model.card)
            labels = self._labels(seeds, list(model_input["label"]) if "label" in model_input else [None] * len(seeds))
            if batch < 1 or any(seed < 0 for seed in seeds):
                raise ValueError("seeds begin at 0, and the batch at 1")
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        with self._alone, one_thread():
            images = generate_padded(self.model, seeds, labels, batch, sampling).cpu().numpy()
        pngs = [base64.b64encode(png_bytes(image)).decode() for image in images]
        return pd.DataFrame({"seed": seeds, "label": labels, "png": pngs})

    def _labels(self, seeds: list[int], given: list[Any]) -> list[int]:
        """The class number of every seed; in turn where none is given."""
        names = self.model.card["class_names"]
        defaults = default_labels(seeds, len(names))
        labels = [default if pd.isna(label) else label for label, default in zip(given, defaults, strict=True)]
        # a column of numbers in which some are missing is one of floats
        whole = [int(label) if isinstance(label, float) and label.is_integer() else label for label in labels]
        try:
            return [class_number(label, names) for label in whole]
        except ValueError as error:
            raise ValueError(f"a label {error}") from None


def _value(name: str, value: Any) -> Any:
    """A parameter as `Sampling` takes it: a pair for a list of two, None for an empty one."""
    if name not in PAIRS:
        return value
    if len(value) not in (0, 2):
        raise ValueError(f"{name} is {list(value)}, and two numbers were wanted, or none")
    return tuple(value) or None
