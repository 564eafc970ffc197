"""`python -m patchloom.pipelines.cli` runs `patchloom`."""

from patchloom.pipelines.cli.app import main

main()
