"""The pipelines: one file per arrow of the flow, joining the models and the platform."""
