"""The module that versions registered by Patchloom 0.1 import their model class from."""

from patchloom.pipelines.registry.pyfunc import SamplerModel

__all__ = ["SamplerModel"]
