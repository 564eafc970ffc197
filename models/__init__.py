"""The method: networks, patches, losses, samplers and checkpoints in pure torch (no Ray, no MLflow)."""
