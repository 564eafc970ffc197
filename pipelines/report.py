"""Report: one self-contained HTML page of a run, a search or a whole chain: pictures first, then numbers."""

import html
from pathlib import Path
from statistics import median
from typing import Any

from patchloom.models.loss import SIGMA_BINS
from patchloom.pipelines.checkpointer import without_tensors
from patchloom.pipelines.evaluation_page import first_number, metric_sections, samples_sections, sampling_words
from patchloom.pipelines.page import COLOURS, document, numbers, picture, svg, tidy
from patchloom.pipelines.search_page import search_sections
from patchloom.platform.copies import local_copy
from patchloom.platform.errors import UserError
from patchloom.platform.progress import clock
from patchloom.platform.recipe import load_recipe
from patchloom.platform.storage import local_path, make_folder, read_json, read_json_lines, write_atomic
from patchloom.platform.tracking import PROGRESS_FILE, tracking_uri


def report(folder: str, out: str) -> Path:
    """Write the page of a run, a search, a folder of samples or of a demo; returns its path.

    Raises UserError for a folder that is none of them.
    """
    place = local_copy(folder, without_tensors)
    if (place / "demo.json").is_file():
        title, sections = _chain_page(place)
    elif (place / "search.json").is_file():
        title, sections = f"Search {read_json(place / 'search.json')['search']['name']}", search_sections(place)
    elif (place / "run.json").is_file():
        title, sections = f"Run {place.name}", _run_sections(place)
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
    run = read_json_lines(folder / "run" / PROGRESS_FILE)[-1]
    recipe = load_recipe(folder / "run" / "recipe.yaml")
    sections = [
        f'<p class="lead">Photographs in, a registered model out: <code>{html.escape(card["model"])}</code>, '
        "trained on patches and sampled at full size.</p>",
        numbers(
            ("samples", f"{samples['n_samples']}"),
            ("training windows", f"{dataset['rows']:,}"),
            ("counted images", f"{run['images_seen']:,}"),
            ("updates", f"{run['updates']:,}"),
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
    sections += ["<h2>The training</h2>", *_run_sections(folder / "run")]
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
    run, card = read_json(folder / "autoencoder" / "run.json"), read_json(folder / "latents" / "dataset.json")
    words = (
        f"{card['autoencoder']['downscale']} x smaller a side: latents of {card['channels']} x {card['resolution']} x "
        f"{card['resolution']}. PSNR {run['psnr_db']:.1f} dB and SSIM {run['ssim']:.3f} on {run['measured_images']} "
        "held-out windows: it bounds how sharp a sample can be."
    )
    return [
        "<h2>The autoencoder</h2>",
        f"<p>{words}</p>",
        picture(folder / "autoencoder" / "reconstructions.png", "Held-out windows above, their reconstructions below."),
    ]


def _run_sections(folder: Path) -> list[str]:
    lines = read_json_lines(folder / PROGRESS_FILE)
    if not lines:
        return ['<p class="note">This run has not written a line yet.</p>']
    sections = [
        numbers(*_counts(lines[-1])),
        numbers(*_speeds(lines)),
        f"<figure>{_curves(lines)}<figcaption>Loss of the trained weights by patch size, and that of the averaged "
        "weights on held-out full-size images; beside it, by noise level.</figcaption></figure>",
    ]
    previews = [line for line in lines if "preview" in line]
    sections += [
        picture(folder / line["preview"], f"Preview after {line['images_seen']:,} counted images.", pixels=True)
        for line in _spread(previews, 3)
    ]
    return sections


def _counts(last: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run has done by its last line, counted in every way there is."""
    counts = [("updates", f"{last['step']:,}"), ("counted images", f"{last['images_seen']:,}")]
    if "full_size_images" in last:  # else the run is an autoencoder's
        counts += [
            ("full-size images", f"{last['full_size_images']:,}"),
            ("images-equivalent, by pixels", f"{last['pixel_equivalent_images']:,.0f}"),
            ("TFLOP", f"{last['flops'] / 1e12:,.1f}"),
            ("left to go", clock(last["eta_seconds"])),
        ]
    return counts


def _speeds(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """How fast a run went: medians of its lines, and the most memory of worker 0."""
    told = [line for line in lines if "straggler_loss" in line]
    speeds = [("images/s (median)", f"{median(line['images_per_second'] for line in lines):,.0f}")]
    if not told:
        return speeds
    by_size = [line["images_per_second_by_patch_size"] for line in told]
    for size in sorted(set().union(*by_size), key=int, reverse=True):
        speeds.append((f"images/s of {size} x {size}", f"{median(r[size] for r in by_size if size in r):,.0f}"))
    peak, source = told[-1]["peak_flops_per_second"], told[-1]["peak_flops_source"]
    of_peak = f"model FLOPs utilisation, of {peak / 1e12:,.3g} TFLOP/s ({source})"
    for key, name in (
        ("model_flops_utilisation", of_peak),
        ("straggler_loss", "straggler loss"),
        ("data_wait_share", "waiting for data"),
    ):
        speeds.append((name, f"{median(line[key] for line in told):.1%}"))
    return [*speeds, ("peak memory", f"{max(line['peak_memory_bytes'] for line in told) / 2**30:,.2f} GiB")]


def _spread(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _curves(lines: list[dict[str, Any]]) -> str:
    """Loss over counted images as inline SVG: by patch size with the held-out loss, and by noise level."""
    from matplotlib.figure import Figure

    by_sigma = any("loss_by_sigma" in line for line in lines)
    figure = Figure(figsize=(11 if by_sigma else 9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2 if by_sigma else 1, sharey=False, squeeze=False)[0]
    sizes = sorted({size for line in lines for size in line.get("loss_by_patch_size", {})}, key=int, reverse=True)
    _plot(panels[0], lines, "loss_by_patch_size", {size: f"{size} x {size}" for size in sizes})
    if not sizes:
        panels[0].plot([line["images_seen"] for line in lines], [line["loss"] for line in lines], color=COLOURS[0])
    held_out = [(line["images_seen"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
    if held_out:
        panels[0].plot(*zip(*held_out, strict=True), "o--", label="held out, full size", color="#1c2430", markersize=4)
    panels[0].set_ylabel("loss")
    if by_sigma:
        names = [name for name in SIGMA_BINS if any(name in line.get("loss_by_sigma", {}) for line in lines)]
        labels = {name: f"sigma {name.replace('-inf', ' and more')}" for name in names}
        _plot(panels[1], lines, "loss_by_sigma", labels)
    for axes in panels:
        axes.set_xlabel("counted images")
        tidy(axes)
    return svg(figure)


def _plot(axes: Any, lines: list[dict[str, Any]], key: str, labels: dict[str, str]) -> None:
    """One curve a name of the dictionary under `key`."""
    for (name, label), colour in zip(labels.items(), COLOURS, strict=False):
        points = [(line["images_seen"], line[key][name]) for line in lines if name in line.get(key, {})]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.4)


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
