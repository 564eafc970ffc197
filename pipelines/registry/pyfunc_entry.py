"""The one file of a registered version: it only imports patchloom."""

from mlflow.models import set_model

from patchloom.pipelines.registry.pyfunc import SamplerModel

set_model(SamplerModel())
