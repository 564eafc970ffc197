"""Search benchmark: `patchloom tune`, compared with the same runs of `patchloom train`."""

import itertools
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from patchloom.benchmarks.findings import Finding, Say, Scale, exact
from patchloom.benchmarks.interleaved import Spread, Work, interleave, now
from patchloom.benchmarks.startup import Workspace, patchloom, small_recipe, wait_for
from patchloom.pipelines.tune.planning import plan_trials
from patchloom.platform.dataset import open_dataset
from patchloom.platform.recipe.search import load_search

GRID = [1.0, 0.75, 0.5, 0.25]  # values of p
CONCURRENT = 2  # trials; also the number of trials at the tiny scale
FLOPS_PER_SECOND = 12e9  # of one core on such a small network; a trial trains for about half of scale.seconds
LINES = 10  # progress lines per trial
MAX_ROUNDS = 2
SMALL_SIDE, SMALL_WIDTH = 32, 16
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # as Ray sets it for a trial with one CPU
MAKE_STORE = "from patchloom.platform.tracking.client import require_reachable; require_reachable()"


def against_trials(scale: Scale, say: Say) -> list[Finding]:
    """A small grid search, two trials at a time, compared with its trials as `train` commands, two at a time.

    Each trial takes a few seconds, so the overhead of the search is a large part of the time: the start of Ray and of
    the trial processes, the table, the page and the MLflow runs.
    """
    small = replace(scale, side=min(SMALL_SIDE, scale.side), width=min(SMALL_WIDTH, scale.width), blocks=1)
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.create(Path(folder), small)
        workspace.run(sys.executable, "-c", MAKE_STORE)
        search = SearchRuns(workspace, write_search(workspace, small))
        alone = TrialRuns(workspace, write_trials(workspace, search.file))
        alternatives: dict[str, Work] = {"search": search, "alone": alone}
        timings = interleave(alternatives, min(scale.rounds, MAX_ROUNDS), 0, say)
    trials, seconds = len(alone.recipes), timings.seconds("alone")
    return [
        Finding(f"a search of {trials} trials over its trials alone", timings.ratio("alone", "search"), "x", 1.0,
                "the trials alone", is_cost=True),
        Finding("  the search", timings.seconds("search"), "s", seconds.median, "the trials alone", is_cost=True),
        Finding("  until its first trial starts", Spread.of(search.first_trial_s), "s", is_cost=True),
        Finding(f"  its trials alone, {CONCURRENT} at a time", seconds, "s", is_cost=True),
        Finding("  FLOPs per trial", exact(trial_flops(small) / 1e9), "GFLOP"),
    ]  # fmt: skip


def write_search(workspace: Workspace, scale: Scale) -> str:
    """Write a grid search at equal FLOPs and its recipe. Returns the path of the search."""
    search = {
        "name": "benchmark-search",
        "recipe": Path(workspace.write_recipe("base", small_recipe(scale))).name,
        "of_budget": {"train.log_every_images": 1 / LINES},
        "space": {"patches.p": {"grid": GRID if scale.seconds > 1 else GRID[:CONCURRENT]}},
        "budget": {"flops": trial_flops(scale)},
    }
    path = workspace.folder / "search.yaml"
    path.write_text(yaml.safe_dump(search))
    return str(path)


def trial_flops(scale: Scale) -> float:
    """The budget of a trial."""
    return scale.seconds / 2 * FLOPS_PER_SECOND


@dataclass(frozen=True)
class SearchRuns:
    """Runs a search into a new folder and records the seconds until its first trial starts."""

    workspace: Workspace
    file: str
    first_trial_s: list[float] = field(default_factory=list)

    def __call__(self) -> int:
        out, start = self.workspace.folder / f"search-{len(self.first_trial_s)}", now()
        options = ("--data", self.workspace.dataset, "--out", str(out), "--concurrent", str(CONCURRENT))
        with self.workspace.running(*patchloom("tune", self.file, *options)) as process:
            wait_for(lambda: any((out / "trials").glob("*")), process)
            self.first_trial_s.append(now() - start)
            process.wait()
        return 1


@dataclass(frozen=True)
class TrialRuns:
    """Runs the trials of a search as `train` commands in parallel processes."""

    workspace: Workspace
    recipes: list[str]
    names: "itertools.count[int]" = field(default_factory=itertools.count)

    def __call__(self) -> int:
        number = next(self.names)
        with ThreadPoolExecutor(CONCURRENT) as pool:
            list(pool.map(self._train, self.recipes, (f"alone-{number}-{trial}" for trial in range(len(self.recipes)))))
        return 1

    def _train(self, recipe: str, name: str) -> None:
        options = ("--data", self.workspace.dataset, "--out", str(self.workspace.folder / name), "--workers", "0")
        self.workspace.run(*patchloom("train", recipe, *options), **ONE_THREAD)


def write_trials(workspace: Workspace, search: str) -> list[str]:
    """Write the recipes of all trials of a search. Returns their paths."""
    planned = plan_trials(*load_search(search), open_dataset(workspace.dataset))
    return [
        workspace.write_recipe(f"trial-{number}", trial.recipe) for number, trial in enumerate(planned) if trial.recipe
    ]
