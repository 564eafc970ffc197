"""Commands about the machine at hand: what works here, and how fast."""

import os
import sys
from typing import Annotated

import typer

from patchloom.pipelines.cli.models import Json


def doctor() -> None:
    """What works here: Ray, GPUs, MLflow, disk."""
    from patchloom.pipelines.inspect import doctor as run

    raise typer.Exit(0 if run() else 1)


def benchmark(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(help="train, sample, prepare, read, tune, startup, scaling, or a part such as train.sizes"),
    ] = None,
    as_json: Json = False,
    out: Annotated[str | None, typer.Option(help="A folder that keeps the numbers, as JSON and plots")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="How often compared ways take turns; 5")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Smallest sizes, only to see that everything runs")] = False,
    force: Annotated[bool, typer.Option("--force", help="Measure beside other work too")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Name all parts and how long they take, and stop")] = False,
) -> None:
    """Measure this machine: each number beside its limit and beside a plain loop."""
    command = [sys.executable, "-m", "patchloom.benchmarks", *(subjects or [])]
    flags = {"--json": as_json, "--tiny": tiny, "--force": force, "--list": list_}
    command += [flag for flag, is_set in flags.items() if is_set]
    command += ["--out", out] if out else []
    command += ["--rounds", str(rounds)] if rounds else []
    os.execv(sys.executable, command)  # afresh: nothing that was imported until here is in what is measured
