"""Demo: the whole chain on photographs that ship with scikit-image, each step a command of its own."""

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.pipelines.evaluate.evaluation import evaluate
from patchloom.pipelines.inspect import dataset_sheet
from patchloom.pipelines.prepare.preparing import prepare
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.report import report
from patchloom.pipelines.sample.sampling import sample
from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder
from patchloom.pipelines.train.training import train
from patchloom.pipelines.tune.tuning import tune
from patchloom.platform.compute.cluster import ray_session
from patchloom.platform.files.storage import local_path, make_folder, read_json, write_atomic, write_json
from patchloom.platform.progress import clock, say
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.tracking.runs import require_reachable, run_exists, tracking_uri

DEMO_FORMAT = 1
# Photographs in scikit-image's own wheel: CC0 or public domain, no download.
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "retina.jpg", "rocket.jpg")
WORKERS = 2
SEEDS = "0-63"


@dataclass(frozen=True)
class Chain:
    """The two chains: through latents of an autoencoder of one's own, or straight on pixels."""

    name: str
    resolution: int
    search: str
    latents: bool


LATENTS = Chain("patchloom-demo", 64, "demo_search", latents=True)
PIXELS = Chain("patchloom-demo-pixels", 32, "demo_pixels_search", latents=False)


def demo(out: str = "demo", *, pixels: bool = False) -> Path:
    """Photographs in, a registered model, samples and a report out; returns the report's path.

    Every step keeps what it finished, so a second call goes on where the first stopped. Raises UserError
    for a folder that cannot be written or was made with another MLflow store.
    """
    chain = PIXELS if pixels else LATENTS
    folder = make_folder(local_path(out))
    began = time.monotonic()
    require_reachable()
    _check_folder(folder, chain)
    say(f"The chain of Patchloom in {folder}, tracked in {tracking_uri()}")
    with ray_session(WORKERS):
        _run(folder, chain, _Steps(8 if chain.latents else 6))
    page = report(str(folder), str(folder / "report.html"))
    say(f"\nDone in {clock(time.monotonic() - began)}. Open {page}")
    say(f"Next: {command('patchloom models list')}   {command('mlflow ui')} --backend-store-uri {tracking_uri()}")
    return page


class _Steps:
    def __init__(self, count: int) -> None:
        self.count, self.number = count, 0

    def __call__(self, words: str) -> None:
        self.number += 1
        say(f"\n[{self.number}/{self.count}] {words}")


def _run(folder: Path, chain: Chain, step: _Steps) -> None:
    lines: list[str] = []

    def begin(words: str, line: str) -> None:
        step(words)
        lines.append(line)
        say(f"  $ {line}")

    side, here = chain.resolution, Path(os.path.relpath(folder))
    photographs = _photographs(folder / "photographs")
    begin(
        f"Preparing: {side} x {side} windows of {len(PHOTOGRAPHS)} photographs",
        f"patchloom prepare {here}/photographs {here}/pixels --resolution {side} --crop windows",
    )
    data = images = str(folder / "pixels")
    dataset_sheet(prepare(str(photographs), images, resolution=side, crop="windows"), folder / "dataset.png")
    if chain.latents:
        settings = AutoencoderSettings()
        begin(
            "Training a small autoencoder on them",
            f"patchloom autoencoder train {here}/pixels --out {here}/autoencoder --workers {WORKERS} "
            f"--register {chain.name}-autoencoder",
        )
        trained = train_autoencoder(
            images, str(folder / "autoencoder"), settings, workers=WORKERS, register=f"{chain.name}-autoencoder"
        )
        begin(
            "Encoding the windows as latents",
            f"patchloom prepare {here}/pixels {here}/latents --autoencoder {trained.reference}",
        )
        data = str(folder / "latents")
        prepare(images, data, autoencoder=trained.reference)
    short = Path(os.path.relpath(data))
    begin("Searching p and the schedule", f"patchloom tune {chain.search} --data {short} --out {here}/search")
    search = tune(chain.search, data, str(folder / "search"), restore=(folder / "search" / "search.json").is_file())
    begin(
        "Training the best setting on patches",
        f"patchloom train {here}/search/best.yaml --data {short} --out {here}/run --workers {WORKERS}",
    )
    recipe = load_recipe(search.folder / "best.yaml")
    train(recipe, data, str(folder / "run"), workers=WORKERS, resume=True)
    begin(
        f"Registering the model as {chain.name}@champion",
        f"patchloom models register {here}/run {chain.name} --alias champion",
    )
    version = register(str(folder / "run"), chain.name, alias="champion")
    begin("Sampling", f"patchloom sample models:/{chain.name}@champion {here}/samples --seeds {SEEDS}")
    sample(f"models:/{chain.name}@champion", str(folder / "samples"), SEEDS)
    begin("Measuring", f"patchloom evaluate {here}/samples --reference {here}/pixels --features colours")
    evaluate(str(folder / "samples"), images, features="colours")
    card: dict[str, Any] = {"format_version": DEMO_FORMAT, "kind": "demo", "chain": chain.name, "commands": lines}
    write_json(folder / "demo.json", card | {"model": version, "tracking_uri": tracking_uri()})


def _check_folder(folder: Path, chain: Chain) -> None:
    """Refuse to continue the other chain, or one whose runs are in another MLflow store."""
    mark = folder / ".chain"
    if not mark.is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no demo: choose another --out, or an empty folder")
    if mark.is_file() and mark.read_text() != chain.name:
        raise UserError(f"{folder} holds the chain {mark.read_text()}: choose another --out, or remove it")
    for run in (folder / "autoencoder" / "run.json", folder / "search" / "search.json", folder / "run" / "run.json"):
        run_id = read_json(run)["run_id"] if run.is_file() else None
        if run_id is not None and not run_exists(run_id):
            raise UserError(
                f"{folder} belongs to another MLflow store than {tracking_uri()}: remove it, or choose --out"
            )
    write_atomic(mark, chain.name)


def _photographs(folder: Path) -> Path:
    """Copy the photographs out of scikit-image, each in a folder named after it: that is its class."""
    import skimage

    source = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        place = make_folder(folder / Path(name).stem) / name
        if not place.is_file():
            write_atomic(place, (source / name).read_bytes())
    return folder


def command(line: str) -> str:
    """A command as it can be typed here: with the environment's folder where that is not on the PATH."""
    name = line.split()[0]
    if shutil.which(name):
        return line
    return f"{os.path.relpath(Path(sys.executable).parent)}/{line}"
