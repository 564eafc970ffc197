"""Report: one self-contained HTML page about a run, a search, samples or a demo."""

from pathlib import Path

from markupsafe import Markup

from patchloom.errors import UserError
from patchloom.pipelines.evaluate.page import (
    METRICS_FILE,
    first_metric,
    metrics_section,
    samples_section,
    sampling_text,
)
from patchloom.pipelines.pages.html import Number, Picture, document, is_for_pages, is_own_page, render
from patchloom.pipelines.reproduce import reproduction_section
from patchloom.pipelines.train.page import run_section, run_title
from patchloom.pipelines.tune.page import search_section, search_title
from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_new_file
from patchloom.platform.files.storage import make_folder, write_atomic
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.records.autoencoder_run import AutoencoderRunCard
from patchloom.platform.records.dataset import DatasetCard
from patchloom.platform.records.demo import DEMO_FILE, DemoCard
from patchloom.platform.records.evaluation import EvaluationResult
from patchloom.platform.records.reproduction import REPRODUCTION_FILE
from patchloom.platform.records.run import last_progress
from patchloom.platform.tracking.store import shown_uri
from patchloom.redaction import redacted


def report(folder: str, out: str) -> Path:
    """Write one HTML page about a run, a search, a folder of samples, a reproduction or a demo.

    Args:
        folder: the folder; may be remote.
        out: the HTML file to write; may be remote.

    Returns:
        The path of the page; for a remote page of a local copy.

    Raises:
        UserError: the folder is none of these, or `out` is a folder.

    Example:
        page = patchloom.report("run", "report.html")
    """
    place, name = Folder.of_file(out)
    here = working_copy(place, "page") if place.is_remote else make_folder(place.path)
    if not name or (here / name).is_dir():
        raise UserError(f"{out} is a folder: give the name of a file, such as {out.rstrip('/')}/report.html")
    check_new_file(place, name, "page of `report`", is_own_page)
    title, body = _title_and_body(folder, local_copy(folder, is_for_pages))
    write_atomic(here / name, document(title, body))
    if place.is_remote:
        place.put(here / name, name)
    return here / name


def _title_and_body(address: str, folder: Path) -> tuple[str, Markup]:
    if (folder / REPRODUCTION_FILE).is_file():
        return reproduction_section(address, folder)
    if (folder / DEMO_FILE).is_file():
        return "From photographs to samples", _demo_section(folder)
    given = Folder.at(address)
    name = redacted(given.address) if given.is_remote else given.name  # a remote folder has a local copy here
    if (folder / "search.json").is_file():
        return search_title(folder), search_section(folder, name=name)
    if (folder / "run.json").is_file():
        return run_title(folder, name), run_section(folder, name=name)
    if (folder / "sampling.json").is_file():
        return f"Samples {name}", samples_section(folder, name)
    raise UserError(
        f"{folder} is not a run, search, samples, reproduction or demo: give the --out folder of one of these commands"
    )


def _demo_section(folder: Path) -> Markup:
    """The pages of all steps of a demo, one below the other."""
    card = DemoCard.from_file(folder / DEMO_FILE)
    measured = folder / "samples" / METRICS_FILE
    samples = EvaluationResult.read(measured).identity
    sheet = f"Seeds {samples.seeds}, classes in turn; {sampling_text(samples)}."
    has_autoencoder = (folder / "autoencoder" / "run.json").is_file()
    return render(
        "demo.html",
        model=card.model,
        headline=_headline(folder, measured),
        sheet=Picture(folder / "samples" / "contact_sheet.png", sheet, command=_command(card, "sample")),
        dataset=DatasetCard.from_file(folder / "pixels" / "dataset.json"),
        windows=Picture(
            folder / "dataset.png",
            "Windows spread evenly over the dataset, in its order.",
            command=_command(card, "prepare"),
        ),
        autoencoder=AutoencoderRunCard.read(folder / "autoencoder") if has_autoencoder else None,
        latents=DatasetCard.from_file(folder / "latents" / "dataset.json") if has_autoencoder else None,
        reconstructions=Picture(
            folder / "autoencoder" / "reconstructions.png",
            "Top: held-out windows. Bottom: their reconstructions.",
            command=_command(card, "autoencoder train"),
        ),
        search=search_section(folder / "search", _command(card, "tune")),
        run=run_section(folder / "run", _command(card, "train")),
        metrics=metrics_section(measured, _command(card, "evaluate")),
        commands=card.commands,
        next_commands=_next_commands(card.chain),
    )


def _command(card: DemoCard, words: str) -> str:
    """The first command of a demo that begins with these words; empty if there is none."""
    return next((line for line in card.commands if line.startswith(f"patchloom {words} ")), "")


def _headline(folder: Path, measured: Path) -> list[Number]:
    """The numbers at the top of a demo's page."""
    run = last_progress(folder / "run")
    patches = load_recipe(folder / "run" / "recipe.yaml").patches
    return [
        Number("samples", f"{EvaluationResult.read(measured).identity.n_samples:,}"),
        Number("training windows", f"{DatasetCard.from_file(folder / 'pixels' / 'dataset.json').rows:,}"),
        Number("counted images", f"{run.images_seen:,}"),
        Number("updates", f"{run.updates:,}"),
        Number("p, schedule", f"{patches.p:g}, {patches.schedule}"),
        first_metric(measured),
    ]


def _next_commands(name: str) -> list[str]:
    return [
        "patchloom models list",
        f"patchloom models show models:/{name}@champion",
        f"patchloom sample models:/{name}@champion more-samples --seeds 0-255 --guidance 1.3",
        "patchloom train demo_latents --data YOUR_LATENTS --out run --set patches.p=0.25 --dry-run",
        f"mlflow ui --backend-store-uri {shown_uri()}",
    ]
