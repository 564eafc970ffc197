"""MLflow: runs, metrics and the model registry."""
