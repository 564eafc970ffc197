"""The command line: `patchloom COMMAND ...`."""

from patchloom.pipelines.cli.app import main

__all__ = ["main"]
