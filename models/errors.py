"""Errors of the method's files."""


class CheckpointError(ValueError):
    """A model, checkpoint or snapshot that cannot be read, with what was found and what was wanted."""
