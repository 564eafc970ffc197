"""The pipelines: one sub-package per step of the flow, joining the method (models) and the platform."""
