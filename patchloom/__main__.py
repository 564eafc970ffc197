"""`python -m patchloom` runs the command line."""

from patchloom.pipelines.cli.app import main

main()
