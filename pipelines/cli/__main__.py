"""`python -m patchloom.pipelines.cli` is `patchloom`."""

from patchloom.pipelines.cli.app import main

main()
