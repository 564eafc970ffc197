"""Plots: a record of benchmarks as pictures, and scaling to 1,024 GPUs.

python -m patchloom.benchmarks.plots RECORD.json        # beside the record
python -m patchloom.benchmarks.plots scaling FOLDER
"""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#b3541e", "#2f6690", "#81a4cd", "#7a9e7e", "#9b7ede")  # those of the pages
WIDTH_IN, ROW_IN, LABEL_CHARACTERS = 8.0, 0.34, 60  # two lines fit a row


def plot_record(path: Path) -> list[Path]:
    """Draw a record's rates, ratios and curves; gives the files, which lie beside it."""
    record = json.loads(path.read_text())
    groups = {name: _findings(each) for name, each in record["subjects"].items()}
    made = []
    for unit in ("images/s", "x"):
        rows = [(name, found) for name, each in groups.items() for found in each if found["unit"].startswith(unit)]
        if rows:
            made.append(_bars(path.with_name(f"{path.stem}-{'rates' if unit != 'x' else 'ratios'}.svg"), rows, record))
    if record.get("curves"):
        made.append(_curves(path.with_name(f"{path.stem}-quality.svg"), record))
    return made


def _findings(subject: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = subject["findings"] if isinstance(subject, dict) else subject
    return found


def _bars(path: Path, rows: list[tuple[str, dict[str, Any]]], record: dict[str, Any]) -> Path:
    """One bar a number, its middle half as a line, its limit as a tick and what was wanted as a dotted one."""
    figure, axes = plt.subplots(figsize=(WIDTH_IN, 1.2 + ROW_IN * len(rows)), layout="constrained")
    subjects = list(dict.fromkeys(name for name, _ in rows))
    for place, (subject, found) in enumerate(rows):
        spread, colour = found["measured"], COLOURS[subjects.index(subject) % len(COLOURS)]
        axes.barh(place, spread["median"], color=colour, height=0.6)
        axes.plot([spread["low"], spread["high"]], [place, place], color="black", linewidth=1.5)
        axes.annotate(f" {spread['median']:.3g}", (max(spread["median"], spread["high"]), place), va="center", size=8)
        for key, style in (("limit", "-"), ("wanted", ":")):
            if found[key] is not None and found[key] < 40 * spread["median"]:
                axes.plot([found[key]] * 2, [place - 0.4, place + 0.4], color="black", linestyle=style)
    labels = [textwrap.fill(_label(found), LABEL_CHARACTERS) for _, found in rows]
    axes.set_yticks(range(len(rows)), labels, size=8)
    axes.invert_yaxis()
    if rows[0][1]["unit"] != "x":
        axes.set_xscale("log")
    axes.set_xlabel(f"{rows[0][1]['unit']}  (| limit, ⋮ wanted)" if rows else "")
    _finish(figure, axes, f"{record['date']}: {record['machine']['words']}")
    return _save(figure, path)


def _label(found: dict[str, Any]) -> str:
    """What was measured, and of what where the unit says so: a counted image or an update."""
    what, unit = str(found["what"]).strip(), str(found["unit"])
    return f"{what}, {unit[2:]}" if unit.startswith("x ") else what


def _curves(path: Path, record: dict[str, Any]) -> Path:
    """Distance over the seconds of training."""
    figure, axes = plt.subplots(figsize=(WIDTH_IN, 4), layout="constrained")
    for number, (name, curve) in enumerate(record["curves"].items()):
        seconds = [point["seconds"] for point in curve]
        axes.plot(seconds, [point["distance"] for point in curve], "o-", color=COLOURS[number], label=name)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("Fréchet distance of samples")
    axes.legend(frameon=False)
    _finish(figure, axes, f"quality at equal time, {record['date']}: {record['machine']['words']}")
    return _save(figure, path)


def plot_scaling(folder: Path) -> Path:
    """Counted images a second on 1 to 1,024 GPUs, of a batch that grows with them and of the paper's batch."""
    from patchloom.benchmarks.scaling import BATCH_OF_GPU, BATCH_OF_PAPER, GPUS, WAYS, Costs

    costs = Costs()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for number, way in enumerate(WAYS):
        rates = [costs.rate(way, gpus, BATCH_OF_GPU) for gpus in GPUS]
        left.loglog(GPUS, rates, "o-", color=COLOURS[number], label=way.name, markersize=4)
        left.loglog(GPUS, [rates[0] * gpus for gpus in GPUS], ":", color=COLOURS[number], linewidth=1)
        rates = [costs.rate(way, gpus, BATCH_OF_PAPER // gpus) for gpus in GPUS]
        right.loglog(GPUS, rates, "o-", color=COLOURS[number], label=way.name, markersize=4)
    for axes, title in ((left, f"{BATCH_OF_GPU} images a GPU (dotted: without waiting)"),
                        (right, f"a batch of {BATCH_OF_PAPER:,} in all")):  # fmt: skip
        axes.set_xlabel("GPUs (H100)")
        axes.set_xticks(GPUS[::2], [f"{gpus:,}" for gpus in GPUS[::2]])
        axes.minorticks_off()
        _finish(figure, axes, title)
    left.set_ylabel("counted images a second")
    left.legend(frameon=False)
    return _save(figure, folder / "scaling.svg")


def _finish(figure: Any, axes: Any, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, size=10, loc="left")


def _save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "patchloom"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def main() -> int:
    """Draw what was asked for."""
    if sys.argv[1:2] == ["scaling"] and len(sys.argv) == 3:
        print(plot_scaling(Path(sys.argv[2])))
    elif len(sys.argv) == 2 and Path(sys.argv[1]).is_file():
        print(*plot_record(Path(sys.argv[1])), sep="\n")
    else:
        print("patchloom: give a record, or: scaling FOLDER", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
