"""Pyfunc: a registered model as MLflow's own users load and serve it."""

import base64
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types.schema import AnyType, ColSpec, DataType, ParamSchema, ParamSpec, Schema

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.generate import image_size
from patchloom.pipelines.pages.pictures import png_bytes
from patchloom.pipelines.sample.options import DEFAULT_BATCH, SampleOptions, sampler_parameters
from patchloom.pipelines.sample.request_limits import RequestTooSlow, limits_of_environment
from patchloom.pipelines.sample.sampler import load_model_for_sampling, sample_rows
from patchloom.platform.tracking.registry import MODEL_FOLDER

PYFUNC_PARAMETERS = {parameter.name: parameter for parameter in sampler_parameters()}
TYPES: dict[Any, DataType] = {str: DataType.string, int: DataType.long, float: DataType.double}
PAIRS: dict[Any, DataType] = {
    tuple[int, int] | None: DataType.long,
    tuple[float, float] | None: DataType.double,
}


def signature() -> ModelSignature:
    """The signature of a version.

    Inputs are `seed` and, optionally, `label` (a class by name or number). Outputs are `seed`, `label` and `png`
    (base64). Parameters are the options of the sampler and the compute batch. A pair is a list of two numbers, or an
    empty list for None.
    """
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "seed"), ColSpec(AnyType(), "label", required=False)]),
        outputs=Schema([
            ColSpec(DataType.long, "seed"),
            ColSpec(DataType.long, "label"),
            ColSpec(DataType.string, "png"),
        ]),
        params=ParamSchema([_parameter(name) for name in PYFUNC_PARAMETERS]),
    )  # fmt: skip


def _parameter(name: str) -> ParamSpec:
    parameter = PYFUNC_PARAMETERS[name]
    if parameter.annotation in PAIRS:
        return ParamSpec(name, PAIRS[parameter.annotation], [], (-1,))
    return ParamSpec(name, TYPES[parameter.annotation], parameter.default)


def input_example(card: ModelCard) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table of two seeds, with labels if the model has classes, and parameters."""
    table = pd.DataFrame({"seed": [0, 1]})
    classes = card.sampled_classes
    if classes:
        table["label"] = [card.class_names[classes[0]], card.class_names[classes[-1]]]
    return table, {"steps": 18, "sampler": "heun"}


class SamplerModel(PythonModel):
    """Samples images for a table of seeds."""

    def load_context(self, context: Any) -> None:
        """Verify the checksum of the model folder and build the model. Nothing is unpickled."""
        self.limits = limits_of_environment()
        self.model = load_model_for_sampling(context.artifacts[MODEL_FOLDER])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Sample one image per row, with the bytes of `patchloom sample`.

        Args:
            context: MLflow's context.
            model_input: columns `seed` and, optionally, `label`.
            params: parameters of the signature.

        Returns:
            Columns `seed`, `label` (class number) and `png` (base64).

        Raises:
            MlflowException: an option does not fit the model or is beyond `RequestLimits`, a class is unknown, or the
                request takes too long (HTTP status 400).
        """
        columns = model_input.to_dict("list")
        labels = [None if label is pd.NA or label is pd.NaT else label for label in columns.get("label", [])]
        try:
            options = SampleOptions(**{name: _value(name, value) for name, value in (params or {}).items()})
            batch, sampling = options.batch or DEFAULT_BATCH, options.sampling()
            self.limits.check(len(model_input), sampling, batch, max(image_size(self.model.card, sampling)))
            check = self.limits.deadline().check
            classes, images = sample_rows(self.model, columns["seed"], labels, sampling, batch, check)
        except (UserError, ValueError, RequestTooSlow) as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        pngs = [base64.b64encode(png_bytes(image)).decode() for image in images]
        return pd.DataFrame({"seed": columns["seed"], "label": classes, "png": pngs})


def _value(name: str, value: Any) -> Any:
    """The value of a parameter as an option: a pair for a list of two numbers, None for an empty list."""
    if PYFUNC_PARAMETERS[name].annotation not in PAIRS:
        return value
    if len(value) not in (0, 2):
        raise ValueError(f"{name}: {list(value)} is not a list of two numbers, or an empty list")
    return tuple(value) or None
