"""Report: one self-contained HTML page of a run, a search or a whole chain: pictures first, then numbers."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from patchloom import __version__
from patchloom.models.loss import SIGMA_BINS
from patchloom.pipelines.checkpointer import without_tensors
from patchloom.platform.copies import local_copy
from patchloom.platform.errors import UserError
from patchloom.platform.progress import clock
from patchloom.platform.recipe import load_recipe
from patchloom.platform.storage import local_path, make_folder, read_json, read_json_lines, write_atomic
from patchloom.platform.tracking import PROGRESS_FILE, tracking_uri

COLOURS = ("#b3541e", "#2f6690", "#81a4cd", "#7a9e7e", "#9b7ede")
STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --wash: #f5f7f9; --accent: #b3541e; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
.lead, figcaption, .note { color: var(--soft); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.numbers div { background: var(--wash); border-radius: .5rem; padding: .7rem .9rem; }
.numbers b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: .85rem; }
figure { margin: 0 0 1.25rem; }
figure img, figure svg { max-width: 100%; height: auto; display: block; }
figure img.pixels { image-rendering: pixelated; }
figcaption { font-size: .88rem; margin-top: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
tr.best td { font-weight: 600; color: var(--accent); }
pre { background: var(--wash); border-radius: .5rem; padding: .9rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


def report(folder: str, out: str) -> Path:
    """Write the page of a run, a search or the folder of a demo; returns its path.

    Raises UserError for a folder that is none of them.
    """
    place = local_copy(folder, without_tensors)
    if (place / "demo.json").is_file():
        title, sections = _chain_page(place)
    elif (place / "search.json").is_file():
        title, sections = f"Search {place.name}", _search_sections(place)
    elif (place / "run.json").is_file():
        title, sections = f"Run {place.name}", _run_sections(place)
    else:
        raise UserError(f"{place} is no run, search or demo: give the --out folder of one of these commands")
    page = local_path(out)
    make_folder(page.parent)
    if page.is_dir():
        raise UserError(f"{page} is a folder, and the page is a file: give a name such as {page}/report.html")
    write_atomic(page, _document(title, sections))
    return page


def _document(title: str, sections: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(sections)
        + f'\n<p class="note">patchloom {__version__}</p>\n</body></html>\n'
    )


def _chain_page(folder: Path) -> tuple[str, list[str]]:
    card, metrics = read_json(folder / "demo.json"), read_json(folder / "samples" / "metrics.json")
    dataset = read_json(folder / "pixels" / "dataset.json")
    run = read_json_lines(folder / "run" / PROGRESS_FILE)[-1]
    recipe = load_recipe(folder / "run" / "recipe.yaml")
    sections = [
        f'<p class="lead">Photographs in, a registered model out: <code>{html.escape(card["model"])}</code>, '
        "trained on patches and sampled at full size.</p>",
        _numbers(
            ("samples", f"{metrics['n_samples']}"),
            ("training windows", f"{dataset['rows']:,}"),
            ("counted images", f"{run['images_seen']:,}"),
            ("updates", f"{run['updates']:,}"),
            ("p, schedule", f"{recipe.patches.p:g}, {recipe.patches.schedule}"),
            ("Fréchet distance*", f"{metrics['frechet_distance']:.3f}"),
        ),
        _picture(folder / "samples" / "contact_sheet.png", _sampling_words(metrics)),
        "<h2>The data</h2>",
        f"<p>{_data_words(dataset)}</p>",
        _picture(folder / "dataset.png", "Windows spread over the dataset, in its order."),
    ]
    if (folder / "autoencoder" / "run.json").is_file():
        sections += _autoencoder_sections(folder)
    sections += ["<h2>The search</h2>", *_search_sections(folder / "search")]
    sections += ["<h2>The training</h2>", *_run_sections(folder / "run")]
    sections += ["<h2>The numbers</h2>", *_metric_sections(metrics)]
    sections += ["<h2>Go on from here</h2>", *_commands(card)]
    return "From photographs to samples", sections


def _sampling_words(metrics: dict[str, Any]) -> str:
    sampling = metrics["sampling"]
    return (
        f"Seeds {metrics['seeds'][0]} to {metrics['seeds'][1]}, classes in turn; {sampling['sampler']}, "
        f"{sampling['steps']} steps ({sampling['network_evaluations']} network evaluations), "
        f"guidance {sampling['guidance']:g}."
    )


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
        _picture(
            folder / "autoencoder" / "reconstructions.png", "Held-out windows above, their reconstructions below."
        ),
    ]


def _run_sections(folder: Path) -> list[str]:
    lines = read_json_lines(folder / PROGRESS_FILE)
    if not lines:
        return ['<p class="note">This run has not written a line yet.</p>']
    sections = [
        _numbers(*_counts(lines[-1])),
        _numbers(*_speeds(lines)),
        f"<figure>{_curves(lines)}<figcaption>Loss of the trained weights by patch size, and that of the averaged "
        "weights on held-out full-size images; beside it, by noise level.</figcaption></figure>",
    ]
    previews = [line for line in lines if "preview" in line]
    sections += [
        _picture(folder / line["preview"], f"Preview after {line['images_seen']:,} counted images.", pixels=True)
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
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6eaee")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, ncols=2, fontsize="small")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _plot(axes: Any, lines: list[dict[str, Any]], key: str, labels: dict[str, str]) -> None:
    """One curve a name of the dictionary under `key`."""
    for (name, label), colour in zip(labels.items(), COLOURS, strict=False):
        points = [(line["images_seen"], line[key][name]) for line in lines if name in line.get(key, {})]
        axes.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.4)


def _search_sections(folder: Path) -> list[str]:
    trials = read_json_lines(folder / "trials.jsonl")
    search = read_json(folder / "search.json")["search"]
    budget = ", ".join(f"{value:g} {name}" for name, value in search["budget"].items() if value)
    keys = list(search["space"])
    header = [*(key.split(".")[-1] for key in keys), "held-out loss", "updates", "counted images", "TFLOP", "seconds"]
    rows = [
        [*(str(trial["settings"][key]) for key in keys), *_trial_cells(trial)] for trial in trials
    ]  # best first, as the search wrote them
    words = (
        f"{len(trials)} trials of {budget} each; all see the same rows, noise and crop positions. "
        "The held-out loss is that of the averaged weights on full-size images. Trials this short tell which "
        "setting starts best, not which ends best."
    )
    return [f"<p>{html.escape(words)}</p>", _table(header, rows)]


def _trial_cells(trial: dict[str, Any]) -> list[str]:
    if trial["status"] != "finished":
        return [f"failed: {trial['error']}", "", "", "", ""]
    return [
        f"{trial['held_out_loss']:.4f}",
        f"{trial['updates']:,}",
        f"{trial['images_seen']:,}",
        f"{trial['flops'] / 1e12:.3f}",
        f"{trial['seconds']:.0f}",
    ]


def _metric_sections(metrics: dict[str, Any]) -> list[str]:
    words = (
        f"*Fréchet distance on {metrics['features']}: the mean colours of a 4 x 4 grid of tiles, 48 numbers an image. "
        "It sees colours and where they lie, nothing finer, and is not FID. With so few samples much of it is chance: "
        f"as many real images ({metrics['n_samples']}, drawn at random) come to "
        f"{metrics['frechet_distance_of_real_images']:.3f} against the rest."
    )
    header = ["distance", "features", "samples", "reference images", "reference"]
    row = [
        f"{metrics['frechet_distance']:.4f}",
        metrics["features"],
        f"{metrics['n_samples']}",
        f"{metrics['n_reference']:,}",
        metrics["reference_fingerprint"][:12],
    ]
    return [_table(header, [row], best=False), f'<p class="note">{html.escape(words)}</p>']


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


def _numbers(*pairs: tuple[str, str]) -> str:
    cells = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in pairs)
    return f'<div class="numbers">{cells}</div>'


def _picture(path: Path, caption: str, pixels: bool = False) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    style = ' class="pixels"' if pixels else ""
    text = html.escape(caption)
    return (
        f'<figure><img{style} alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
    )


def _table(header: list[str], rows: list[list[str]], best: bool = True) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for index, row in enumerate(rows):
        mark = ' class="best"' if best and index == 0 else ""
        body += f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
