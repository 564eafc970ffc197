"""Pyfunc: a registered model as MLflow's own users load and serve it."""

import base64
from typing import Any

import pandas as pd
from mlflow.models.signature import ModelSignature
from mlflow.pyfunc import PythonModel
from mlflow.types.schema import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from patchloom.models.checkpoints import load_whole_model
from patchloom.models.generate import Sampling, check_fit, default_labels, generate_padded
from patchloom.pipelines.pictures import png_bytes
from patchloom.platform.registry import MODEL_FOLDER

COMPUTE_BATCH = 8  # that of `patchloom sample` on a CPU, so that both give the same bytes


def signature() -> ModelSignature:
    """In: seed and, if wanted, label (a class number). Out: seed, label, png (base64)."""
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.long, "seed"), ColSpec(DataType.long, "label", required=False)]),
        outputs=Schema([
            ColSpec(DataType.long, "seed"),
            ColSpec(DataType.long, "label"),
            ColSpec(DataType.string, "png"),
        ]),
        params=ParamSchema([
            ParamSpec("sampler", DataType.string, "heun"),
            ParamSpec("steps", DataType.long, 18),
            ParamSpec("guidance", DataType.double, 1.0),
        ]),
    )  # fmt: skip


class SamplerModel(PythonModel):
    """Samples images for a table of seeds."""

    def load_context(self, context: Any) -> None:
        """Build the model from its folder; nothing is unpickled."""
        self.model = load_whole_model(context.artifacts[MODEL_FOLDER])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """`seed` (and `label`) columns -> seed, label and the PNG as base64 text."""
        sampling = Sampling(**(params or {}))
        check_fit(sampling, self.model.card)
        seeds = [int(seed) for seed in model_input["seed"]]
        labels = default_labels(seeds, self.model.denoiser.classes)
        if "label" in model_input:
            given = model_input["label"]
            labels = [default if pd.isna(label) else int(label) for label, default in zip(given, labels, strict=True)]
        images = generate_padded(self.model, seeds, labels, COMPUTE_BATCH, sampling)
        pngs = [base64.b64encode(png_bytes(image)).decode() for image in images.numpy()]
        return pd.DataFrame({"seed": seeds, "label": labels, "png": pngs})
