"""The command `patchloom sample`."""

from dataclasses import asdict
from typing import Annotated

import typer

from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.cli.options import Backbones, Json, ModelReference, messages_to_stderr, print_json


def sample(
    model: ModelReference,
    out: Annotated[str, typer.Argument(help="The folder to write, here or at s3://, gs://, ...")],
    seeds: Annotated[str, typer.Option(help="0-63, or 0,5,9, or a file of seeds")] = "0-63",
    steps: Annotated[int, typer.Option(min=1, help="Noise levels; Heun takes 2 x steps - 1 evaluations")] = 18,
    sampler: Annotated[str, typer.Option(help="heun, euler, ddim, ancestral, dpmpp-2m, dpmpp-2m-sde, plms")] = "heun",
    ladder: Annotated[str, typer.Option(help="Noise levels: karras, vp, ve, linear, iddpm")] = "karras",
    churn: Annotated[float, typer.Option(min=0, help="heun: EDM's S_churn, noise added over all steps")] = 0.0,
    churn_between: Annotated[str | None, typer.Option(metavar="LOW-HIGH", help="Noise levels that churn")] = None,
    churn_noise: Annotated[float, typer.Option(min=0, help="EDM's S_noise, such as 1.003")] = 1.0,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none")] = 1.0,
    guidance_between: Annotated[str | None, typer.Option(metavar="LOW-HIGH", help="Noise levels it acts at")] = None,
    label: Annotated[str | None, typer.Option(help="A class by name or number; all in turn by default")] = None,
    labels: Annotated[
        str | None, typer.Option(help="The class of each seed: .csv, .jsonl or .parquet of seed and label, or .txt")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Pixels; the trained size by default")] = None,
    canvas: Annotated[str, typer.Option(help="Other sizes: rescale (again -1..1) or extrapolate (beyond)")] = "rescale",
    outpaint: Annotated[
        str | None, typer.Option(metavar="IMAGE", help="Stays in the middle of a larger --size, which is sampled")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="png, zip, webdataset, parquet or npz")] = "png",
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Images an archive (1000), and what a worker makes at a time")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a compute batch; bytes depend on it")] = 8,
    as_json: Json = False,
    allow_backbone: Backbones = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes at once; all CPUs or GPUs by default; 0 is this one, without Ray"),
    ] = None,
) -> None:
    """Sample images in batches."""
    from patchloom.pipelines.sample.sampling import parse_levels, parse_size
    from patchloom.pipelines.sample.sampling import sample as run

    allow_backbones(*allow_backbone or [])
    with messages_to_stderr(as_json):
        result = run(
            model, out, seeds, steps=steps, sampler=sampler, ladder=ladder, churn=churn,
            churn_between=parse_levels(churn_between, "--churn-between") if churn_between else None,
            churn_noise=churn_noise, guidance=guidance,
            guidance_between=parse_levels(guidance_between, "--guidance-between") if guidance_between else None,
            label=label, labels=labels, size=parse_size(size) if size else None, canvas=canvas, outpaint=outpaint,
            format=format_, shard_size=shard_size, batch=batch, workers=workers,
        )  # fmt: skip
    if as_json:
        print_json(asdict(result))
