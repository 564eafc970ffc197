"""The suite: the list of benchmarks, and one call that runs, prints and keeps some of them."""

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

import patchloom
from patchloom.benchmarks.findings import TINY, Finding, Say, Scale, findings_table
from patchloom.benchmarks.machine import busy_share, describe_machine
from patchloom.benchmarks.result_file import BenchmarkResult, SuiteResults
from patchloom.errors import UserError
from patchloom.pipelines.launch.node import code_digest
from patchloom.platform.compute.machine import keep_freed_memory
from patchloom.platform.files.storage import local_path, make_folder, write_atomic
from patchloom.platform.progress import clock, say

BUSY = 0.15  # share of all cores used by other processes: above it, a warning
TOO_BUSY = 0.5  # above it, an error


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: its function, its minutes on two cores, and what it measures."""

    function: str  # module:name
    minutes: float
    description: str

    def load(self) -> Callable[[Scale, Say], list[Finding]]:
        """Import the function, and with it the packages that it needs."""
        module, name = self.function.split(":")
        found: Callable[[Scale, Say], list[Finding]] = getattr(import_module(f"patchloom.benchmarks.{module}"), name)
        return found


BENCHMARKS = {
    "train.plain": Benchmark(
        "training:against_plain", 0.8, "a training step, compared with a plain loop of the same mathematics"
    ),
    "train.sizes": Benchmark("training:by_size", 2.5, "images per second by patch size, and the gain of patches"),
    "train.parts": Benchmark("training:step_parts", 0.6, "the share of each part of a step"),
    "train.memory": Benchmark("training:memory", 0.2, "memory per crop of each size"),
    "train.precision": Benchmark("training:by_precision", 3.5, "bfloat16 compared with float32"),
    "train.compile": Benchmark("training:compiled", 3.0, "compiled steps compared with eager steps"),
    "train.workers": Benchmark("workers:by_draw", 5.0, "1, 2 and 4 workers, for each draw of patch sizes"),
    "train.overlap": Benchmark("overlap:slow_network", 1.0, "sums over a slow network during the backward pass"),
    "train.latents": Benchmark("latents:precomputed", 5.0, "stored latents compared with encoding in every step"),
    "train.controlnet": Benchmark(
        "controlnets:by_patch_size", 3.0, "ControlNet steps by patch size, and their gain compared with that of FLOPs"
    ),
    "train.platform": Benchmark("platform_cost:against_bare_steps", 11.0, "the time `patchloom train` adds to a step"),
    "train.peers": Benchmark("peers:against_peers", 5.0, "training loops of other packages, at equal size"),
    "sample.plain": Benchmark("sampling:against_plain", 1.5, "sampling, compared with a plain loop"),
    "sample.worker": Benchmark("sampling:ray_data_worker", 1.5, "a worker of `patchloom sample`, compared with a loop"),
    "prepare": Benchmark("preparing:against_pillow", 4.0, "`patchloom prepare`, compared with a Pillow loop"),
    "read": Benchmark("reading:random_rows", 0.3, "random rows of latents from disk"),
    "scale.rows": Benchmark("growth:by_rows", 6.0, "opening and training on up to 10 million rows, and extrapolated"),
    "scale.cache": Benchmark("small_cache:two_epochs", 2.0, "waiting for a store behind a cache of a quarter"),
    "tune": Benchmark("searching:against_trials", 3.0, "a search, compared with its trials alone"),
    "startup": Benchmark("startup:commands", 2.0, "the start-up time of commands"),
    "scaling": Benchmark("scaling:up_to_1024_gpus", 0.1, "steps and data on up to 1,024 GPUs, calculated"),
}


def select_benchmarks(names: Sequence[str]) -> list[str]:
    """The benchmarks of these names or groups (`train` is every `train.*`); all of them without names.

    Raises:
        UserError: a name is unknown.
    """
    selected: list[str] = []
    for name in names or ["all"]:
        matching = [known for known in BENCHMARKS if name in ("all", known, known.split(".")[0])]
        if not matching:
            groups = sorted({known.split(".")[0] for known in BENCHMARKS})
            raise UserError(
                f"benchmark {name} is unknown: choose from {', '.join(groups)}, or a part such as train.sizes "
                "(patchloom benchmark --list)"
            )
        selected += [known for known in matching if known not in selected]
    return selected


def run_benchmarks(
    names: Sequence[str] = (), *, out: str | None = None, rounds: int | None = None, tiny: bool = False,
    force: bool = False,
) -> SuiteResults:  # fmt: skip
    """Measure one benchmark after the other and print a table of each.

    Args:
        names: benchmarks or groups, see `select_benchmarks`.
        out: folder for `benchmark-DATE.json`, see `keep_results`; None keeps nothing.
        rounds: rounds of each comparison; None uses the default.
        tiny: use the smallest sizes, only to check that everything runs.
        force: measure on a busy machine too.

    Returns:
        The results of this call.

    Raises:
        UserError: an unknown name, a folder that cannot be created, or a busy machine.
    """
    selected = select_benchmarks(names)
    if out is not None:
        make_folder(local_path(out))  # fail before the measurement, not after it
    scale = TINY if tiny else Scale()
    scale = scale if rounds is None else replace(scale, rounds=rounds)
    keep_freed_memory()  # as commands do; it applies to the plain loops in this process too
    results = SuiteResults(datetime.now(UTC).strftime("%Y-%m-%d"), describe_machine(), scale, {})
    say(results.machine.words)
    if tiny:
        say("smallest sizes: these numbers only show that everything runs")
    else:
        minutes = sum(BENCHMARKS[name].minutes for name in selected)
        say(f"{len(selected)} benchmarks, about {clock(60 * minutes)} on two cores")
        _require_quiet(force)
    code = code_digest(Path(patchloom.__file__).parent)[:12]
    for number, name in enumerate(selected, 1):
        say(f"\n{name}: {BENCHMARKS[name].description} ({number} of {len(selected)})")
        results.subjects[name] = _measure(name, scale, code)
        if out is not None:
            path = keep_results(results, local_path(out))
    if out is not None:
        from patchloom.benchmarks.plots import plot_results

        say("\n".join(["", f"results: {path}", *(f"plot: {plot}" for plot in plot_results(path))]))
    return results


def _measure(name: str, scale: Scale, code: str) -> BenchmarkResult:
    is_tiny = scale == replace(TINY, rounds=scale.rounds)
    busy, start = busy_share(), time.monotonic()
    if busy > BUSY and not is_tiny:
        say(f"  other processes use {busy:.0%} of this machine's cores: trust the ratios, not the rates")
    findings = BENCHMARKS[name].load()(scale, _progress_line(name))
    if is_tiny:
        findings = [replace(found, wanted=None) for found in findings]
    say(findings_table(findings))
    return BenchmarkResult(
        at=datetime.now(UTC).isoformat(timespec="seconds"), code=code, busy_share_before=busy,
        seconds=time.monotonic() - start, findings=findings,
    )  # fmt: skip


def keep_results(results: SuiteResults, folder: Path) -> Path:
    """Write `benchmark-DATE.json`, and keep its other benchmarks of the same machine and scale.

    Results of another machine or scale are kept in their file; then the next free name is `benchmark-DATE-2.json`.
    """
    for number in itertools.count(1):
        path = folder / f"benchmark-{results.date}{f'-{number}' if number > 1 else ''}.json"
        earlier = SuiteResults.from_json(path.read_text()) if path.is_file() else results
        if earlier.machine == results.machine and earlier.scale == results.scale:
            break
    merged = replace(results, subjects=earlier.subjects | results.subjects)
    write_atomic(path, merged.to_json(indent=2) + "\n")
    return path


def _require_quiet(force: bool) -> None:
    busy = busy_share()
    if busy > TOO_BUSY and not force:
        raise UserError(
            f"other processes use {busy:.0%} of this machine's cores, too much to measure: wait, or pass --force"
        )


def _progress_line(name: str) -> Say:
    """Shows progress in one line of a terminal, and nothing in a log."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: print(f"\r\x1b[K  {name}: {text}", end="\r", file=sys.stderr, flush=True)
