"""The suite: which benchmarks there are, and one call that runs some of them, prints them and keeps them."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from patchloom.benchmarks.findings import TINY, Finding, Say, Scale, table
from patchloom.benchmarks.machine import busy_share, code_digest, describe_machine
from patchloom.errors import UserError
from patchloom.platform.compute.machine import keep_freed_memory
from patchloom.platform.files.storage import make_folder, write_atomic
from patchloom.platform.progress import clock, say

RESULTS_FORMAT = 1
BUSY = 0.15  # of all cores, by others; above it numbers are warned of, and above TOO_BUSY not measured
TOO_BUSY = 0.5


@dataclass(frozen=True)
class Subject:
    """One benchmark: where its function is, how long it takes on two cores, and what it says, in words."""

    function: str  # module:name
    minutes: float
    words: str

    def load(self) -> Callable[[Scale, Say], list[Finding]]:
        """The function; only now is imported what it needs."""
        module, name = self.function.split(":")
        found: Callable[[Scale, Say], list[Finding]] = getattr(import_module(f"patchloom.benchmarks.{module}"), name)
        return found


SUBJECTS = {
    "train.plain": Subject(
        "training:against_plain", 0.8, "a training step beside the same mathematics written plainly"
    ),
    "train.sizes": Subject("training:by_size", 2.5, "images a second by patch size, and what patches gain"),
    "train.parts": Subject("training:by_part", 0.6, "what share of a step is not the network"),
    "train.memory": Subject("training:memory", 0.2, "what a crop of each size keeps in memory"),
    "train.precision": Subject("training:by_precision", 3.5, "bfloat16 beside float32"),
    "train.compile": Subject("training:compiled", 3.0, "compiled steps beside eager ones"),
    "train.workers": Subject("workers:by_draw", 5.0, "1, 2 and 4 workers, and how sizes are drawn across them"),
    "train.latents": Subject("latents:precomputed", 5.0, "latents encoded once beside encoding in every step"),
    "train.platform": Subject("platform_cost:beside_bare_steps", 11.0, "`patchloom train` beside its bare steps"),
    "train.peers": Subject("peers:beside_peers", 5.0, "other packages' training loops, at equal parameters and FLOPs"),
    "sample.plain": Subject("sampling:against_plain", 1.5, "sampling beside the same mathematics written plainly"),
    "sample.worker": Subject("sampling:on_ray_data", 1.5, "a worker of `patchloom sample` beside a plain loop"),
    "prepare": Subject("preparing:beside_pillow", 4.0, "a preparation beside a loop of Pillow"),
    "read": Subject("reading:random_rows", 0.3, "random rows of latents from disk"),
    "tune": Subject("searching:beside_its_trials", 3.0, "a search beside its trials alone"),
    "startup": Subject("startup:commands", 2.0, "how soon commands answer"),
    "scaling": Subject("scaling:to_a_thousand", 0.1, "steps on up to 1,024 GPUs and the data they need, by arithmetic"),
}


def chosen_subjects(names: Sequence[str]) -> list[str]:
    """`train` is all that begins with it; without names all there are. Raises UserError for one that is not known."""
    chosen = []
    for name in names or ["all"]:
        some = [subject for subject in SUBJECTS if name in ("all", subject, subject.split(".")[0])]
        if not some:
            groups = sorted({subject.split(".")[0] for subject in SUBJECTS})
            raise UserError(
                f"benchmark {name} is unknown: choose of {', '.join(groups)}, or a part such as train.sizes "
                "(patchloom benchmark --list)"
            )
        chosen += [subject for subject in some if subject not in chosen]
    return chosen


def benchmark(
    names: Sequence[str] = (), *, out: str | None = None, rounds: int | None = None, tiny: bool = False,
    force: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure these subjects one after the other, print a table of each, and give (and keep) them all as one record.

    names: see `chosen_subjects`. out: a folder for `benchmark-DATE.json`, see `keep`. rounds: how often the ways of
    a comparison take turns. tiny: smallest sizes, to see that everything runs. force: measure on a busy machine
    too. Raises UserError for unknown names, a folder that cannot be made, and a busy machine.
    """
    chosen = chosen_subjects(names)
    if out is not None:
        make_folder(Path(out))  # what cannot be kept is refused before it is measured
    scale = TINY if tiny else Scale()
    scale = scale if rounds is None else replace(scale, rounds=rounds)
    keep_freed_memory()  # as commands do, and so for the plain loops in this process
    machine = describe_machine()
    say(machine["words"])
    if tiny:
        say("smallest sizes: these numbers only show that everything runs")
    else:
        say(
            f"{len(chosen)} benchmarks, about {clock(60 * sum(SUBJECTS[name].minutes for name in chosen))} on two cores"
        )
        _check_quiet(force)
    record: dict[str, Any] = {"format_version": RESULTS_FORMAT, "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                              "machine": machine, "scale": asdict(scale), "subjects": {}}  # fmt: skip
    code = code_digest()
    for number, name in enumerate(chosen, 1):
        say(f"\n{name}: {SUBJECTS[name].words} ({number} of {len(chosen)})")
        busy, began = busy_share(), time.monotonic()
        if busy > BUSY and not tiny:
            say(f"  others use {busy:.0%} of this machine's cores: trust ratios, and not rates")
        findings = SUBJECTS[name].load()(scale, _progress_line(name))
        findings = [replace(found, wanted=None) for found in findings] if tiny else findings
        say(table(findings))
        record["subjects"][name] = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"), "code": code,
            "busy_share_before": busy, "seconds": time.monotonic() - began,
            "findings": [found.describe() for found in findings],
        }  # fmt: skip
        if out is not None:
            path = keep(record, Path(out))
    if out is not None:
        from patchloom.benchmarks.plots import plot_record

        say("\n".join(["", f"kept: {path}", *(f"look at it: {plot}" for plot in plot_record(path))]))
    return record


def keep(record: dict[str, Any], folder: Path) -> Path:
    """Write `benchmark-DATE.json`; what it says of other subjects on the same machine stays.

    What it says of another machine, or at another scale, stays too, and `benchmark-DATE-2.json` is next.
    """
    for number in itertools.count(1):
        path = folder / f"benchmark-{record['date']}{f'-{number}' if number > 1 else ''}.json"
        before = json.loads(path.read_text()) if path.is_file() else record
        if before["machine"] == record["machine"] and before["scale"] == record["scale"]:
            break
    record = record | {"subjects": before["subjects"] | record["subjects"]}
    write_atomic(path, json.dumps(record, indent=2) + "\n")
    return path


def _check_quiet(force: bool) -> None:
    busy = busy_share()
    if busy > TOO_BUSY and not force:
        raise UserError(
            f"others use {busy:.0%} of this machine's cores, and what is measured now says little: wait, or --force"
        )


def _progress_line(name: str) -> Say:
    """Says what is going on where somebody watches; a log keeps the results alone."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K  {name}: {text}", end="\r", file=sys.stderr, flush=True)
