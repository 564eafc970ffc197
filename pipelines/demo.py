"""Demo: every step of the flow on photographs that ship with scikit-image, each with the command that does the same."""

import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from patchloom.errors import UserError
from patchloom.pipelines.evaluate.evaluation import evaluate
from patchloom.pipelines.inspect import dataset_sheet
from patchloom.pipelines.prepare.photographs import PHOTOGRAPHS, copy_photographs
from patchloom.pipelines.prepare.preparing import prepare
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.report import report
from patchloom.pipelines.sample.sampling import sample
from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder
from patchloom.pipelines.train.training import train
from patchloom.pipelines.tune.tuning import tune
from patchloom.platform.compute.session import ray_session
from patchloom.platform.files.storage import local_path, make_folder, read_json, write_atomic, write_json
from patchloom.platform.progress import clock, say
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.records.demo import DEMO_FILE, DemoCard
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.runs import run_exists
from patchloom.platform.tracking.store import shown_uri

WORKERS = 2
SEEDS = "0-63"


@dataclass(frozen=True)
class DemoVariant:
    """What one variant of the demo makes; `name` is the name of its registered model."""

    name: str
    resolution: int
    search: str
    steps: int
    latents: bool


LATENTS_DEMO = DemoVariant("patchloom-demo", 64, "demo_search", steps=8, latents=True)
PIXELS_DEMO = DemoVariant("patchloom-demo-pixels", 32, "demo_pixels_search", steps=6, latents=False)


def demo(out: str = "demo", *, pixels: bool = False) -> Path:
    """Run every step on photographs: prepare, search, train, register, sample, evaluate, report.

    Each step keeps what it finished, so that a second call continues where the first one stopped.

    Args:
        out: the folder for all results.
        pixels: train on 32 x 32 pixels, instead of on latents of 64 x 64 pixels.

    Returns:
        The path of the report, an HTML page.

    Raises:
        UserError: the folder cannot be written, has other files in it, or belongs to another MLflow store.
    """
    variant = PIXELS_DEMO if pixels else LATENTS_DEMO
    folder = make_folder(local_path(out))
    started = time.monotonic()
    require_reachable()
    _check_folder(folder, variant)
    say(f"Patchloom demo in {folder}, tracked in {shown_uri()}")
    with ray_session(WORKERS):
        _run_steps(_DemoFolder(folder, variant))
    page = report(str(folder), str(folder / "report.html"))
    say(f"\nDone in {clock(time.monotonic() - started)}. Open {page}", is_result=True)
    say(
        f"Next: {runnable('patchloom models list')}   {runnable('mlflow ui')} --backend-store-uri {shown_uri()}",
        is_result=True,
    )
    return page


@dataclass
class _DemoFolder:
    """The folder of a demo, with the commands of the steps so far."""

    folder: Path
    variant: DemoVariant
    commands: list[str] = field(default_factory=list)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def begin(self, title: str, command: str) -> None:
        """Print the title of the next step and its command, where {demo} is this folder."""
        line = command.format(demo=os.path.relpath(self.folder))
        self.commands.append(line)
        say(f"\n[{len(self.commands)}/{self.variant.steps}] {title}\n  $ {line}")


def _run_steps(demo: _DemoFolder) -> None:
    pixels = _prepare_pixels(demo)
    data = _encode_latents(demo, pixels) if demo.variant.latents else "pixels"
    _search(demo, data)
    _train(demo, data)
    version = _register(demo)
    _sample(demo)
    _evaluate(demo, pixels)
    card = DemoCard(chain=demo.variant.name, commands=demo.commands, model=version, tracking_uri=shown_uri())
    write_json(demo.folder / DEMO_FILE, card.model_dump(mode="json"))


def _prepare_pixels(demo: _DemoFolder) -> str:
    photographs, side = copy_photographs(demo.folder / "photographs"), demo.variant.resolution
    demo.begin(
        f"Prepare {side} x {side} windows of {len(PHOTOGRAPHS)} photographs",
        f"patchloom prepare {{demo}}/photographs {{demo}}/pixels --resolution {side} --crop windows",
    )
    dataset = prepare(str(photographs), demo.path("pixels"), resolution=side, crop="windows")
    dataset_sheet(dataset, demo.folder / "dataset.png")
    return demo.path("pixels")


def _encode_latents(demo: _DemoFolder, pixels: str) -> str:
    """Train an autoencoder and encode the windows; the name of the dataset in the demo's folder."""
    name = f"{demo.variant.name}-autoencoder"
    demo.begin(
        "Train a small autoencoder on the windows",
        f"patchloom autoencoder train {{demo}}/pixels --out {{demo}}/autoencoder --workers {WORKERS} --register {name}",
    )
    trained = train_autoencoder(pixels, demo.path("autoencoder"), AutoencoderSettings(), workers=WORKERS, register=name)
    demo.begin(
        "Encode the windows as latents",
        f"patchloom prepare {{demo}}/pixels {{demo}}/latents --autoencoder {trained.reference}",
    )
    prepare(pixels, demo.path("latents"), autoencoder=trained.reference)
    return "latents"


def _search(demo: _DemoFolder, data: str) -> None:
    demo.begin(
        "Search p and the schedule",
        f"patchloom tune {demo.variant.search} --data {{demo}}/{data} --out {{demo}}/search",
    )
    restore = (demo.folder / "search" / "search.json").is_file()
    tune(demo.variant.search, demo.path(data), demo.path("search"), restore=restore)


def _train(demo: _DemoFolder, data: str) -> None:
    demo.begin(
        "Train the best setting on patches",
        f"patchloom train {{demo}}/search/best.yaml --data {{demo}}/{data} --out {{demo}}/run --workers {WORKERS}",
    )
    recipe = load_recipe(demo.path("search/best.yaml"))
    train(recipe, demo.path(data), demo.path("run"), workers=WORKERS, resume=True)


def _register(demo: _DemoFolder) -> str:
    name = demo.variant.name
    demo.begin(
        f"Register the model as {name}@champion",
        f"patchloom models register {{demo}}/run {name} --alias champion",
    )
    return register(demo.path("run"), name, alias="champion")


def _sample(demo: _DemoFolder) -> None:
    model = f"models:/{demo.variant.name}@champion"
    demo.begin("Sample", f"patchloom sample {model} {{demo}}/samples --seeds {SEEDS}")
    sample(model, demo.path("samples"), SEEDS)


def _evaluate(demo: _DemoFolder, pixels: str) -> None:
    demo.begin("Evaluate", "patchloom evaluate {demo}/samples --reference {demo}/pixels --features colours")
    evaluate(demo.path("samples"), pixels, features="colours")


def _check_folder(folder: Path, variant: DemoVariant) -> None:
    """Raise UserError for other files, the other variant, or runs that are not in the current MLflow store."""
    mark = folder / ".chain"
    if not mark.is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and is not a demo: choose another --out or an empty folder")
    if mark.is_file() and mark.read_text() != variant.name:
        raise UserError(f"{folder} contains the demo {mark.read_text()}: choose another --out or remove the folder")
    for card in (folder / "autoencoder" / "run.json", folder / "search" / "search.json", folder / "run" / "run.json"):
        run_id = read_json(card).get("run_id") if card.is_file() else None
        if run_id is not None and not run_exists(run_id):
            raise UserError(
                f"{folder} has runs that are not in the MLflow store {shown_uri()}: choose another --out or "
                "remove the folder"
            )
    write_atomic(mark, variant.name)


def runnable(line: str) -> str:
    """A command line that works in this shell: with the path of its program if that is not on the PATH."""
    if shutil.which(line.split()[0]):
        return line
    return f"{os.path.relpath(Path(sys.executable).parent)}/{line}"
