"""Report: one self-contained HTML page of a run, a search or a whole chain: pictures first, then numbers."""

import html
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.pipelines.evaluate.page import first_number, metric_sections, samples_sections, sampling_words
from patchloom.pipelines.pages.html import document, numbers, picture
from patchloom.pipelines.train.checkpointer import without_tensors
from patchloom.pipelines.train.page import run_sections
from patchloom.pipelines.tune.page import search_sections
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.storage import local_path, make_folder, read_json, write_atomic
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.records.autoencoder_run import AutoencoderRunCard
from patchloom.platform.records.run import read_progress
from patchloom.platform.tracking.client import tracking_uri


def report(folder: str, out: str) -> Path:
    """Write one HTML page about a run, a search, a folder of samples or a demo.

    Args:
        folder: the folder; may be remote.
        out: the HTML file to write.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder is none of these, or `out` is a folder.

    Example:
        page = patchloom.report("run", "report.html")
    """
    place = local_copy(folder, without_tensors)
    if (place / "demo.json").is_file():
        title, sections = _chain_page(place)
    elif (place / "search.json").is_file():
        title, sections = f"Search {read_json(place / 'search.json')['search']['name']}", search_sections(place)
    elif (place / "run.json").is_file():
        title, sections = f"Run {place.name}", run_sections(place)
    elif (place / "sampling.json").is_file():
        title, sections = f"Samples {place.name}", samples_sections(place)
    else:
        raise UserError(f"{place} is no run, search, samples or demo: give the --out folder of one of these commands")
    page = local_path(out)
    make_folder(page.parent)
    if page.is_dir():
        raise UserError(f"{page} is a folder, and the page is a file: give a name such as {page}/report.html")
    write_atomic(page, document(title, sections))
    return page


def _chain_page(folder: Path) -> tuple[str, list[str]]:
    card, measured = read_json(folder / "demo.json"), folder / "samples" / "metrics.json"
    samples = read_json(measured)["identity"]
    dataset = read_json(folder / "pixels" / "dataset.json")
    run = read_progress(folder / "run")[-1]
    recipe = load_recipe(folder / "run" / "recipe.yaml")
    sections = [
        f'<p class="lead">Photographs in, a registered model out: <code>{html.escape(card["model"])}</code>, '
        "trained on patches and sampled at full size.</p>",
        numbers(
            ("samples", f"{samples['n_samples']}"),
            ("training windows", f"{dataset['rows']:,}"),
            ("counted images", f"{run.images_seen:,}"),
            ("updates", f"{run.updates:,}"),
            ("p, schedule", f"{recipe.patches.p:g}, {recipe.patches.schedule}"),
            first_number(measured),
        ),
        picture(folder / "samples" / "contact_sheet.png", _sampling_words(samples)),
        "<h2>The data</h2>",
        f"<p>{_data_words(dataset)}</p>",
        picture(folder / "dataset.png", "Windows spread over the dataset, in its order."),
    ]
    if (folder / "autoencoder" / "run.json").is_file():
        sections += _autoencoder_sections(folder)
    sections += ["<h2>The search</h2>", *search_sections(folder / "search")]
    sections += ["<h2>The training</h2>", *run_sections(folder / "run")]
    sections += ["<h2>The numbers</h2>", *metric_sections(measured)]
    sections += ["<h2>Go on from here</h2>", *_commands(card)]
    return "From photographs to samples", sections


def _sampling_words(identity: dict[str, Any]) -> str:
    return f"Seeds {identity['seeds']}, classes in turn; {sampling_words(identity)}"


def _data_words(card: dict[str, Any]) -> str:
    reasons = "; ".join(f"{count:,} x {html.escape(reason)}" for reason, count in card["skipped"]["reasons"].items())
    classes = ", ".join(f"{html.escape(entry['name'])} {entry['rows']:,}" for entry in card["classes"])
    skipped = f"{card['skipped']['count']:,} skipped" + (f" ({reasons})" if reasons else "")
    words = f"{card['rows']:,} rows of {card['resolution']} x {card['resolution']} pixels + {skipped} = "
    words += f"{card['inputs']:,} inputs. Classes: {classes}."
    if card["split_by"] == "region":
        words += " Held-out windows come from other regions of the photographs than training windows."
    return words


def _autoencoder_sections(folder: Path) -> list[str]:
    run, card = AutoencoderRunCard.read(folder / "autoencoder"), read_json(folder / "latents" / "dataset.json")
    words = (
        f"{card['autoencoder']['downscale']} x smaller a side: latents of {card['channels']} x {card['resolution']} x "
        f"{card['resolution']}. PSNR {run.psnr_db:.1f} dB and SSIM {run.ssim:.3f} on {run.measured_images} "
        "held-out windows: it bounds how sharp a sample can be."
    )
    return [
        "<h2>The autoencoder</h2>",
        f"<p>{words}</p>",
        picture(folder / "autoencoder" / "reconstructions.png", "Held-out windows above, their reconstructions below."),
    ]


def _commands(card: dict[str, Any]) -> list[str]:
    name = card["chain"]
    onward = [
        "patchloom models list",
        f"patchloom models show models:/{name}@champion",
        f"patchloom sample models:/{name}@champion more-samples --seeds 0-255 --guidance 1.3",
        "patchloom train demo_latents --data YOUR_LATENTS --out run --set patches.p=0.25 --dry-run",
        f"mlflow ui --backend-store-uri {tracking_uri()}",
    ]
    return [
        "<p>What this page was made with; each line can be run by itself, from the folder that the chain ran in.</p>",
        f"<pre>{html.escape(chr(10).join(card['commands']))}</pre>",
        "<p>What to try next.</p>",
        f"<pre>{html.escape(chr(10).join(onward))}</pre>",
    ]
