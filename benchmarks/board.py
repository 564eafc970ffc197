"""The board: how long trainings take to a held-out loss and to an FID, as dated rows of `docs/board.jsonl`.

    python -m patchloom.benchmarks.board emoji RUN [RUN ...] [--samples FOLDER ...] [--note TEXT]

The runs are one recipe with several seeds. Their row is added to the file, and the table of `docs/board.md` is written
again. Minutes are those of training steps: starts, previews and measurements do not count.
"""

import argparse
import html
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from pydantic import Field

from patchloom.errors import UserError
from patchloom.pipelines.train.resuming import RECIPE_FILE, differing_keys
from patchloom.pipelines.train.run_folder import is_model_of
from patchloom.platform.compute.hardware import machine_words
from patchloom.platform.files.storage import read_json, whole_lines, write_atomic
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe
from patchloom.platform.records.evaluation import EvaluationResult
from patchloom.platform.records.record import VersionedRecord
from patchloom.platform.records.run import ProgressLine, RunCard, read_progress, training_seconds
from patchloom.platform.records.samples import SamplingCard

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ROWS_FILE, PAGE_FILE, METRICS = "board.jsonl", "board.md", "metrics.json"
BEGIN, END = "<!-- rows of {} -->", "<!-- end of rows -->"
UNSHOWN = ("name", "seed", "train.images", "patches.p", "patches.schedule")  # they have cells of their own
REPORTING = ("preview.", "train.checkpoint_", "train.keep.", "train.log_", "train.held_out_")  # not what is trained


@dataclass(frozen=True)
class Track:
    """A dataset with targets; only runs of the same rows are compared.

    Args:
        recipe: what a run is compared with, to show its changes; in the repository.
        dataset: fingerprint of the prepared dataset.
        held_out_fraction: share of its images that is not trained on.
        held_out_images: of them, how many a held-out loss must use.
        loss: the target of the held-out loss.
        fid: the target of the FID.
        samples: how many samples an FID must have; the reference is the whole dataset.
    """

    recipe: str
    dataset: str
    held_out_fraction: float
    held_out_images: int
    loss: float
    fid: float
    samples: int


TRACKS = {
    "emoji": Track(
        recipe="examples/emoji/recipe.yaml",
        dataset="b1f6bb49327898fa4483301fb1c981810d0f3e215470b7bf0249234144f8d03e",
        held_out_fraction=0.1, held_out_images=152, loss=0.2, fid=100.0, samples=1520,
    ),
}  # fmt: skip


class BoardRow(VersionedRecord):
    """Trainings of one recipe with several seeds. Values are in the order of the seeds."""

    format_version: int = 1
    track: str
    date: str
    code_version: str
    code_commit: str
    machine: str
    recipe: str
    p: float
    schedule: str
    changes: list[str] = Field(default_factory=list)  # `key=value`, of what differs from the recipe of the track
    seeds: list[int]
    minutes: list[float]  # of the whole training
    minutes_to_loss: list[float | None]  # None where the loss was not reached
    held_out_loss: list[float]  # at the end
    fid: list[float] | None = None  # at the end
    images: float  # mean
    flops: float  # mean
    note: str = ""

    def reaches(self, track: Track) -> tuple[list[float] | None, list[float] | None]:
        """The minutes to the loss and to the FID of the track, None where a seed did not reach it."""
        to_loss = [minutes for minutes in self.minutes_to_loss if minutes is not None]
        is_fid = self.fid is not None and max(self.fid) <= track.fid
        return to_loss if len(to_loss) == len(self.seeds) else None, self.minutes if is_fid else None


@dataclass(frozen=True)
class Run:
    """A finished run, with its progress, and what its samples have."""

    folder: Path
    card: RunCard
    recipe: Recipe
    lines: Sequence[ProgressLine]
    result: EvaluationResult | None

    @classmethod
    def read(cls, folder: Path, samples: Path | None) -> "Run":
        """Read a run folder.

        Raises:
            UserError: files are missing or damaged, the run is not finished, or the samples are of another model.
        """
        card, recipe, lines = RunCard.read(folder), load_recipe(folder / RECIPE_FILE), read_progress(folder)
        model = folder / "model"
        is_finished = (model / "model.json").is_file() and is_model_of(model, recipe)
        if not (is_finished and lines and lines[-1].held_out_loss is not None):
            raise UserError(f"{folder} is not finished, or has no held-out loss at its end: continue it with --resume")
        if samples is None:
            return cls(folder, card, recipe, lines, None)
        result, sampled = EvaluationResult.read(samples / METRICS), SamplingCard.from_file(samples / "sampling.json")
        if sampled.model.weights_sha256 != read_json(model / "model.json").get("weights_sha256"):
            raise UserError(f"{samples} has samples of another model than that of {folder}: give those of each run")
        return cls(folder, card, recipe, lines, result)

    def check(self, track: Track) -> None:
        """Raise UserError if it cannot be compared with the others of the track."""
        if self.card.dataset_fingerprint != track.dataset:
            raise UserError(
                f"{self.folder} was trained on other images than those of the track: prepare them as it says"
            )
        data, held_out = self.recipe.data, self.recipe.train.held_out_images
        if (data.held_out_fraction, data.images) != (track.held_out_fraction, None) or held_out < track.held_out_images:
            raise UserError(
                f"{self.folder} holds out {data.held_out_fraction:g} of the images and measures {held_out} of them: "
                f"the track has data.held_out_fraction={track.held_out_fraction:g}, all images, and "
                f"train.held_out_images={track.held_out_images}"
            )
        if self.result is None:
            return
        found = self.result.identity
        if (found.n_samples, found.reference) != (track.samples, track.dataset) or "fid" not in self.result.metrics:
            raise UserError(
                f"the samples of {self.folder} need an FID of {track.samples:,} samples against the dataset: "
                f"sample --seeds 0-{track.samples - 1}, then evaluate --reference DATASET"
            )

    @property
    def code(self) -> tuple[str, str]:
        """The version and the commit of the code."""
        return self.card.code_version, self.card.code_commit

    @property
    def minutes(self) -> float:
        """The time of all steps."""
        return training_seconds(self.lines)[-1] / 60

    def minutes_to(self, loss: float) -> float | None:
        """The time of steps until the held-out loss reaches a target, None where it does not.

        Between two measurements it is on a straight line of the logarithm, so that measuring more often does not help.
        """
        before: tuple[float, float] | None = None
        for seconds, line in zip(training_seconds(self.lines), self.lines, strict=True):
            if line.held_out_loss is None:
                continue
            if line.held_out_loss <= loss:
                if before is None:
                    return seconds / 60
                share = math.log(before[1] / loss) / math.log(before[1] / line.held_out_loss)
                return (before[0] + share * (seconds - before[0])) / 60
            before = seconds, line.held_out_loss
        return None


def board_row(name: str, runs: Sequence[Run], machine: str, note: str = "") -> BoardRow:
    """The row of runs of one recipe that differ in their seeds.

    Raises:
        UserError: a run does not belong to the track, differs from the first in more than its seed, or has its seed.
    """
    track, first = TRACKS[name], runs[0]
    for run in runs:
        run.check(track)
        if others := set(differing_keys(first.recipe, run.recipe)) - {"seed"}:
            raise UserError(
                f"{run.folder} differs from {first.folder} in {', '.join(sorted(others))}: add a row for each"
            )
        if run.code != first.code:
            raise UserError(f"{run.folder} and {first.folder} come from different versions: add a row for each")
    seeds = [run.recipe.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"the seeds of the runs are {', '.join(map(str, seeds))}: give one run for each seed")
    fids = [float(str(run.result.metrics["fid"])) for run in runs if run.result]
    return BoardRow(
        track=name, date=time.strftime("%Y-%m-%d", time.gmtime()), code_version=first.card.code_version,
        code_commit=first.card.code_commit, machine=machine, recipe=first.recipe.name, p=first.recipe.patches.p,
        schedule=first.recipe.patches.schedule, changes=_changes(track, first.recipe), seeds=seeds,
        minutes=[run.minutes for run in runs], minutes_to_loss=[run.minutes_to(track.loss) for run in runs],
        held_out_loss=[float(str(run.lines[-1].held_out_loss)) for run in runs],
        fid=fids if len(fids) == len(runs) else None, images=mean(run.lines[-1].images_seen for run in runs),
        flops=mean(run.lines[-1].flops for run in runs), note=note,
    )  # fmt: skip


def _changes(track: Track, recipe: Recipe) -> list[str]:
    """The keys that differ from the recipe of the track, and have an effect on what is trained."""
    found = differing_keys(load_recipe(ROOT / track.recipe), recipe)
    shown = [key for key in found if key not in UNSHOWN and not key.startswith(REPORTING)]
    return [f"{key}={found[key][1]}" for key in shown]


def table(name: str, rows: Sequence[BoardRow]) -> str:
    """The rows of a track in Markdown, the fastest first; those that did not reach the loss come last."""
    track = TRACKS[name]

    def order(row: BoardRow) -> tuple[float, float]:
        to_loss, _ = row.reaches(track)
        return (mean(to_loss) if to_loss else float("inf"), mean(row.held_out_loss))

    lines = [
        f"| date | recipe | minutes to loss {track.loss:g} | minutes to FID {track.fid:g} | loss and FID at the end | "
        "images, TFLOP | machine | version |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted((row for row in rows if row.track == name), key=order):
        to_loss, to_fid = row.reaches(track)
        ends = spread(row.held_out_loss, 4) + (f"; {spread(row.fid, 1)}" if row.fid else "")
        recipe = f"{row.recipe}, p {row.p:g}" + (f" {row.schedule}" if row.schedule != "stochastic" else "")
        fid = spread(to_fid, 1) if to_fid else "not reached" if row.fid else "not measured"
        code = f"{row.code_version} {row.code_commit[:12]}".strip()
        about = "; ".join(filter(None, [f"{recipe}, {len(row.seeds)} seeds", ", ".join(row.changes), row.note]))
        cells = [
            row.date, about, spread(to_loss, 1) if to_loss else "not reached", fid, ends,
            f"{row.images:,.0f}; {row.flops / 1e12:,.0f}", row.machine, code,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text in a cell of a Markdown table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def spread(values: Sequence[float], digits: int) -> str:
    """The mean and the standard deviation over the seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def read_rows(docs: Path = DOCS) -> list[BoardRow]:
    """All rows; raises UserError where the file is damaged."""
    path = docs / ROWS_FILE
    content = path.read_bytes() if path.is_file() else b""
    if content and not content.endswith(b"\n"):
        raise UserError(f"{path} ends in the middle of a line: end its last line with a newline, or remove it")
    return [BoardRow.parse(line, path) for line in whole_lines(content)]


def page_with_rows(page: str, rows: Sequence[BoardRow]) -> str:
    """The page with its tables written again; raises UserError where their place is not marked."""
    for name in TRACKS:
        begin = BEGIN.format(name)
        before, begins, rest = page.partition(begin)
        _, ends, after = rest.partition(END)
        if not (begins and ends):
            raise UserError(f"{PAGE_FILE} lacks the lines {begin} and {END}, between which the table is: restore them")
        page = f"{before}{begin}\n{table(name, rows)}\n{END}{after}"
    return page


def add(row: BoardRow, docs: Path = DOCS) -> None:
    """Add a row to the file, and write the tables of the page again.

    Raises:
        UserError: there is no page, or a file is damaged.
    """
    if not (docs / PAGE_FILE).is_file():
        raise UserError(f"{docs / PAGE_FILE} does not exist: add rows in a clone of the repository")
    rows = [*read_rows(docs), row]
    page = page_with_rows((docs / PAGE_FILE).read_text(), rows)
    write_atomic(docs / ROWS_FILE, "".join(f"{one.to_json()}\n" for one in rows))
    write_atomic(docs / PAGE_FILE, page)


def main() -> int:
    """Parse the options and add a row. Returns the exit code, 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        "python -m patchloom.benchmarks.board", description="Add a row to the board of times to a quality."
    )
    parser.add_argument("track", choices=sorted(TRACKS))
    parser.add_argument("runs", nargs="+", type=Path, help="finished runs of one recipe, one for each seed")
    parser.add_argument("--samples", nargs="+", type=Path, help="evaluated samples of each run, in the same order")
    parser.add_argument("--machine", help="where they were trained; default: this machine")
    parser.add_argument("--note", default="", help="what is special about them, in a few words")
    options = parser.parse_args()
    try:
        samples = options.samples or [None] * len(options.runs)
        if len(samples) != len(options.runs):
            raise UserError(f"{len(options.runs)} runs have {len(samples)} folders of samples: give one for each run")
        runs = [Run.read(run, folder) for run, folder in zip(options.runs, samples, strict=True)]
        row = board_row(options.track, runs, options.machine or machine_words(), options.note)
        add(row)
    except (UserError, OSError) as error:
        print(f"patchloom: {error}", file=sys.stderr)
        return 2
    print(table(options.track, [row]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
