"""The commands about results: measure samples, and write a page about a run, a search or samples."""

from typing import Annotated

import typer

from patchloom.pipelines.cli.options import (
    Gpus,
    MapWorkers,
    ResourceSettings,
    Wait,
    check_order,
    chosen_resources,
    exists_here,
)
from patchloom.pipelines.cli.output import Printed
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
            help="Feature extractor: inception, dinov2, a file of Inception weights or TorchScript, or colours: not "
            "FID but mean colours of tiles, a quick check without a network"
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
) -> Printed:
    """Measure images: FID, KID, precision, recall and more."""
    nodes = chosen_resources(resources, wait, workers, gpus)
    from patchloom.pipelines.evaluate.evaluation import evaluate

    result = evaluate(
        samples, reference, metrics=tuple(metrics.split(",")) if metrics else None, features=features, out=out,
        save_reference=save_reference, workers=nodes.workers, batch=batch, resources=nodes,
    )  # fmt: skip
    return Printed(result.to_dict())


def report(
    folder: Annotated[str, typer.Argument(help="Folder of a run, a search, samples, a reproduction or a demo")],
    out: Annotated[str, typer.Argument(help="HTML file to write")],
) -> Printed:
    """Write an HTML page about a run, search, samples or reproduction."""
    check_order("FOLDER OUT", folder, out, exists_here)
    from patchloom.pipelines.report import report

    page = report(folder, out)
    place = out if is_remote(out) else str(page)
    return Printed({"page": place}, f"open {place}")
