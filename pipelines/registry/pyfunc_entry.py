"""The model code of a registered version: this file only imports Patchloom."""

from mlflow.models import set_model

from patchloom.pipelines.registry.pyfunc import SamplerModel

set_model(SamplerModel())
