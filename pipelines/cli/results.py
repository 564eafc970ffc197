"""The commands about results: measure samples, and write a page about a run, a search or samples."""

from typing import Annotated

import typer

from patchloom.pipelines.cli.options import (
    Gpus,
    Json,
    MapWorkers,
    ResourceSettings,
    Wait,
    chosen_resources,
    messages_to_stderr,
    print_json,
)
from patchloom.platform.files.folder import is_remote


def evaluate(
    samples: Annotated[
        str, typer.Argument(help="Images: a folder of `patchloom sample`, a folder of PNG files, .npz, or a dataset")
    ],
    reference: Annotated[
        str, typer.Option(help="What to compare with: images as for SAMPLES, or an .npz of statistics (EDM's or ADM's)")
    ],
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: fid, sfid, kid, is, precision, recall, fd, psnr, ssim  [default: all that apply "
            "except psnr and ssim]"
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="Feature extractor: inception, dinov2, colours (mean tile colours, no network), or a file of "
            "Inception weights or TorchScript"
        ),
    ] = "inception",
    out: Annotated[str | None, typer.Option(help="JSON file to write  [default: SAMPLES/metrics.json]")] = None,
    save_reference: Annotated[
        str | None,
        typer.Option(metavar="NPZ", help="Also save the statistics of the reference (mu, sigma, mu_s, sigma_s)"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per forward pass")] = 32,
    workers: MapWorkers = None,
    gpus: Gpus = None,
    resources: ResourceSettings = None,
    wait: Wait = None,
    as_json: Json = False,
) -> None:
    """Measure images: FID, KID, precision, recall, ..."""
    nodes = chosen_resources(resources, wait, workers, gpus)
    from patchloom.pipelines.evaluate.evaluation import evaluate

    with messages_to_stderr(as_json):
        result = evaluate(
            samples, reference, metrics=tuple(metrics.split(",")) if metrics else None, features=features, out=out,
            save_reference=save_reference, workers=nodes.workers, batch=batch, resources=nodes,
        )  # fmt: skip
    if as_json:
        print_json(result.to_dict())


def report(
    folder: Annotated[str, typer.Argument(help="Folder of a run, a search, samples, a reproduction or a demo")],
    out: Annotated[str, typer.Argument(help="HTML file to write")],
) -> None:
    """Write an HTML page about a run, search, samples or reproduction."""
    from patchloom.pipelines.report import report

    page = report(folder, out)
    print(f"open {out if is_remote(out) else page}")
