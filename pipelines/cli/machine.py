"""The commands that show what this machine does: run the demo, check the installation, measure the speed."""

import os
import sys
from typing import Annotated

import typer

from patchloom.pipelines.cli.completion import reproduced_tables
from patchloom.pipelines.cli.output import Json, Printed, printed_plan


def demo(
    out: Annotated[str, typer.Option(help="Folder for all results")] = "demo",
    pixels: Annotated[
        bool, typer.Option("--pixels", help="Train on 32 x 32 pixels, without an autoencoder: faster")
    ] = False,
) -> Printed:
    """Run every step on photographs that ship with scikit-image."""
    from patchloom.pipelines.demo import demo

    return Printed({"page": str(demo(out, pixels=pixels))})


def reproduce(
    table: Annotated[
        str,
        typer.Argument(
            help="table1, table2, table3, table4, figure2, figure3, schedule, samplers, controlnet, "
            "efficiency, speed or extrapolation",
            autocompletion=reproduced_tables,
        ),
    ],
    small: Annotated[
        bool,
        typer.Option("--small", help="Make the same comparison at small scale, on two CPU cores in an hour or two"),
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SOURCE",
            help="Images or a prepared dataset for the paper's data, such as celeba=img_align_celeba.zip; can be "
            "repeated  [default with --small: photographs]",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write  [default: TABLE or TABLE-small]")] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="For latents: models:/..., a folder or a hub id  [default: Stable Diffusion's; with --small, one is "
            "trained]"
        ),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="Features of the metrics  [default: inception; colours with --small]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For samplers and extrapolation: sample this model instead of training one")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Workers of each training  [default: 1; 0 with --small]")
    ] = (None),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost and the commands, then exit")] = False,
) -> Printed:
    """Reproduce a table or figure of the paper.

    Prints the cost first, runs the commands of each stage, and writes a page with the paper's numbers next to yours.
    Run the same command again to continue after an interruption.
    """
    from patchloom.pipelines.reproduce import ReproductionOptions, describe_reproduction, reproduce

    named = dict(_name_and_source(text) for text in data or [])
    options = ReproductionOptions(small, named, autoencoder, features, model, workers)
    if dry_run:
        plan = describe_reproduction(table, out, options)
        return printed_plan(plan, flops=plan.flops)
    return Printed({"page": str(reproduce(table, out, options))})


def _name_and_source(text: str) -> tuple[str, str]:
    """`cat=photos` as its two parts; the name is empty where there is none."""
    name, mark, source = text.partition("=")
    return (name, source) if mark and name.isalnum() else ("", text)


def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Check every node of the cluster at RAY_ADDRESS")] = False,
    store: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="With --cluster: check that every node can read and write here"),
    ] = None,
) -> Printed:
    """Check torch, GPUs, disk space, MLflow and Ray.

    With --cluster, also compare the nodes: versions, code, clocks, cache space. The exit code is 1 if something does
    not work.
    """
    if not (cluster or store):
        from patchloom.pipelines.doctor.machine import check_machine

        machine = check_machine()
        return Printed(machine.to_json(), exit_code=0 if machine.works else 1)
    from patchloom.pipelines.doctor.cluster import check_nodes, nodes_text

    nodes = check_nodes(store)
    return Printed(nodes.to_json(), nodes_text(nodes), 0 if nodes.works else 1)


def benchmark(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            help="train, sample, prepare, read, tune, startup, scaling, scale, or a part such as train.sizes  "
            "[default: all]"
        ),
    ] = None,
    as_json: Json = False,
    out: Annotated[str | None, typer.Option(help="Folder to write: results as JSON, and plots")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Interleaved repetitions of each variant  [default: 5]")] = (
        None
    ),
    tiny: Annotated[bool, typer.Option("--tiny", help="Use the smallest sizes, only to check that everything runs")] = (
        False
    ),
    force: Annotated[bool, typer.Option("--force", help="Measure even if other processes use the machine")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List all parts and how long they take, then exit")] = False,
) -> None:
    """Measure the speed of this machine.

    Each number is printed next to the limit of the hardware, and next to a plain training loop.
    """
    command = [sys.executable, "-m", "patchloom.benchmarks", *(subjects or [])]
    flags = {"--json": as_json, "--tiny": tiny, "--force": force, "--list": list_}
    command += [flag for flag, is_set in flags.items() if is_set]
    command += ["--out", out] if out else []
    command += ["--rounds", str(rounds)] if rounds else []
    os.execv(sys.executable, command)  # a new process, so that modules imported so far do not change the numbers
