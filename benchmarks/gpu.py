"""GPU benchmark: the speed, memory and kernels of the paper's networks on one GPU, and quality at equal time.

It needs torch, numpy and safetensors, no installation and no network access, and takes less than ten minutes:
`make bench-gpu`, or from a checkout

    python -m patchloom.benchmarks.gpu [--images cifar.npz] [--features inception.safetensors] [--out FOLDER]

DDPM++ on 64 x 64 pixels is compared with plain float32 without TF32, as the released code trains on pixels. ADM on
latents of 32 is compared with half precision without compilation, as the released code trains on latents. With
`--images` (`images`, N x H x W x 3 uint8), it also trains for some minutes at p = .25, .5 and 1 and measures the
Fréchet distance of samples over time. Measurements that do not fit into the time are skipped with a message. One that
fails does not end the others, and the result file is written after each.
"""

import argparse
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch

from patchloom.benchmarks.findings import TINY, Scale
from patchloom.benchmarks.gpu_launches import launches
from patchloom.benchmarks.gpu_quality import RATIOS, quality
from patchloom.benchmarks.gpu_sampling import sampling_speeds
from patchloom.benchmarks.gpu_session import GpuSession, say
from patchloom.benchmarks.gpu_training import (
    COMPILE_S,
    FASTEST,
    FASTEST_EAGER,
    LATENT_VARIANTS,
    PIXEL_VARIANTS,
    device_limits,
    flops_by_size,
    patch_gain,
    speeds,
)
from patchloom.benchmarks.machine import describe_machine
from patchloom.benchmarks.result_file import GpuResults
from patchloom.benchmarks.setups import adm_config, song_config, step_settings
from patchloom.errors import UserError
from patchloom.models.features import ColourFeatures, Features, features_of_file
from patchloom.platform.files.storage import make_folder

PIXEL = Scale(rounds=3, width=128, side=64, batch=64)
LATENT = Scale(rounds=3, width=192, side=32, batch=64, blocks=3)
# expected on an H100
COUNTING_S = 30.0
QUALITY_S, SAMPLED_S = 100.0, 80.0  # training at each p, and everything else of the quality


def measure(session: GpuSession, images: np.ndarray | None, features: Features) -> None:
    """Run the measurements that fit into the time, the most important first; what slows down the others is last."""
    pixel, latent = session.results.scales["pixel"], session.results.scales["latent"]
    song = song_config(pixel.side, pixel.width, pixel.blocks, dropout=0.05)
    adm = adm_config(latent.side, 32, 1) if session.is_tiny else adm_config(latent.side)
    on_pixels, on_latents = f"DDPM++ on {pixel.side} pixels", f"ADM on latents of {latent.side}"
    session.measure("limits", 5, partial(device_limits, session))
    session.measure(
        f"{on_pixels}: training", 40, partial(speeds, session, on_pixels, song, pixel, PIXEL_VARIANTS, True)
    )
    session.measure(
        f"{on_pixels}: gain of patches", 20, partial(patch_gain, session, on_pixels, song, pixel, FASTEST_EAGER)
    )
    session.measure(f"{on_pixels}: sampling", 60, partial(sampling_speeds, session, on_pixels, song, pixel))
    session.measure(f"{on_pixels}: crop sizes", 40, partial(flops_by_size, session, on_pixels, song, pixel))
    session.measure(f"{on_latents}: training", 40, partial(speeds, session, on_latents, adm, latent, LATENT_VARIANTS))
    if images is None:
        say("\nquality at equal time skipped: pass --images FILE.npz")
    else:
        seconds = 0.5 if session.is_tiny else min(QUALITY_S, (session.seconds_left - SAMPLED_S) / len(RATIOS))
        session.measure("quality at equal time", SAMPLED_S + 60, partial(quality, session, images, features, seconds))
    if not session.is_tiny:
        needed = 30 + COMPILE_S * len(step_settings(pixel, 0.5).schedule.sizes)
        session.measure(
            f"{on_pixels}: gain of patches, compiled", needed,
            partial(patch_gain, session, on_pixels, song, pixel, FASTEST),
        )  # fmt: skip
    session.attempt(f"{on_pixels}: launches", partial(launches, session, on_pixels, song, pixel))


def main() -> int:
    """Parse the options, measure and write the result file.

    Returns:
        The exit code: 1 if a measurement failed, 2 without a GPU or for a wrong argument.
    """
    parser = argparse.ArgumentParser("patchloom.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a .npz file with `images` (N, H, W, 3) uint8")
    parser.add_argument("--features", type=Path, help="weights of Inception; default: colours of tiles")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result file")
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes on any device, only to check that everything runs"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print(
            "patchloom: torch finds no CUDA device: run this on a machine with a GPU, or pass --tiny",
            file=sys.stderr,
        )
        return 2
    for path in (options.images, options.features):
        if path is not None and not path.is_file():
            print(f"patchloom: {path} is not a file: pass another file, or none", file=sys.stderr)
            return 2
    try:
        make_folder(options.out)
    except UserError as error:
        print(f"patchloom: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features = features_of_file(options.features, device) if options.features else ColourFeatures()
    images = np.load(options.images)["images"] if options.images else None
    tiny = replace(TINY, rounds=1)
    results = GpuResults(
        datetime.now(UTC).strftime("%Y-%m-%d"), describe_machine(),
        {"pixel": tiny if options.tiny else PIXEL, "latent": replace(tiny, batch=2) if options.tiny else LATENT},
    )  # fmt: skip
    path = options.out / f"gpu-{results.date}.json"
    session = GpuSession(device, time.monotonic() + 60 * options.minutes - COUNTING_S, options.tiny, results, path)
    measure(session, images, features)
    say(f"\nresults: {path}")
    draw(path)
    return 1 if session.has_failed else 0


def draw(path: Path) -> None:
    """Plot the result file if matplotlib is installed."""
    try:
        from patchloom.benchmarks.plots import plot_results
    except ImportError:
        say(f"no plots: matplotlib is not installed; python -m patchloom.benchmarks.plots {path} draws them elsewhere")
        return
    for plot in plot_results(path):
        say(f"plot: {plot}")


if __name__ == "__main__":
    sys.exit(main())
