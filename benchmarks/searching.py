"""Searching: what `patchloom tune` adds to its trials, beside the same runs of `patchloom train` alone."""

import itertools
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from patchloom.benchmarks.findings import Finding, Say, Scale, exactly
from patchloom.benchmarks.paired import Spread, Work, in_turns, now
from patchloom.benchmarks.startup import Desk, patchloom, small_recipe, wait_for
from patchloom.pipelines.tune.trials import plan_trials
from patchloom.platform.dataset import open_dataset
from patchloom.platform.recipe.search import load_search

GRID = [1.0, 0.75, 0.5, 0.25]  # of p
AT_ONCE = 2  # trials, and all there are where they only show that they run
FLOPS_A_SECOND = 12e9  # of one core on a network as small as this; a trial trains for about half of scale.seconds
LINES = 10  # of a trial's progress
MOST_ROUNDS = 2
SMALL_SIDE, SMALL_WIDTH = 32, 16
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # what Ray gives a trial of one CPU
MAKE_STORE = "from patchloom.platform.tracking.runs import require_reachable; require_reachable()"


def beside_its_trials(scale: Scale, say: Say) -> list[Finding]:
    """A small grid search as a command, two trials at a time, beside its trials as commands, two at a time.

    Each trial is a run of a few seconds on a small network, so that what a search adds is a large part of it: the
    start of Ray and of the trials' processes on it, the table, the page, and MLflow's runs.
    """
    small = replace(scale, side=min(SMALL_SIDE, scale.side), width=min(SMALL_WIDTH, scale.width), blocks=1)
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk.laid(Path(folder), small)
        desk.run(sys.executable, "-c", MAKE_STORE)
        search = Searches(desk, write_search(desk, small))
        alone = Alone(desk, write_trials(desk, search.file))
        ways: dict[str, Work] = {"search": search, "alone": alone}
        turns = in_turns(ways, min(scale.rounds, MOST_ROUNDS), 0, say)
    trials, seconds = len(alone.recipes), turns.seconds("alone")
    return [
        Finding(f"a search of {trials} trials over its trials alone", turns.ratio("alone", "search"), "x", 1.0,
                "its trials alone", is_cost=True),
        Finding("  the search", turns.seconds("search"), "s", seconds.median, "its trials alone", is_cost=True),
        Finding("  until its first trial begins", Spread.of(search.first_trial_s), "s", is_cost=True),
        Finding(f"  its trials alone, {AT_ONCE} at a time", seconds, "s", is_cost=True),
        Finding("  FLOPs a trial", exactly(trial_flops(small) / 1e9), "GFLOP"),
    ]  # fmt: skip


def write_search(desk: Desk, scale: Scale) -> str:
    """The path of a grid search at equal FLOPs; its recipe lies beside it."""
    search = {
        "name": "benchmark-search",
        "recipe": Path(desk.write_recipe("base", small_recipe(scale))).name,
        "of_budget": {"train.log_every_images": 1 / LINES},
        "space": {"patches.p": {"grid": GRID if scale.seconds > 1 else GRID[:AT_ONCE]}},
        "budget": {"flops": trial_flops(scale)},
    }
    path = desk.folder / "search.yaml"
    path.write_text(yaml.safe_dump(search))
    return str(path)


def trial_flops(scale: Scale) -> float:
    """What a trial may spend."""
    return scale.seconds / 2 * FLOPS_A_SECOND


@dataclass(frozen=True)
class Searches:
    """Searches of one file, each into a new folder; notes when their first trials begin."""

    desk: Desk
    file: str
    first_trial_s: list[float] = field(default_factory=list)

    def __call__(self) -> int:
        out, began = self.desk.folder / f"search-{len(self.first_trial_s)}", now()
        options = ("--data", self.desk.dataset, "--out", str(out), "--concurrent", str(AT_ONCE))
        with self.desk.begun(*patchloom("tune", self.file, *options)) as process:
            wait_for(lambda: any((out / "trials").glob("*")), process)
            self.first_trial_s.append(now() - began)
            process.wait()
        return 1


@dataclass(frozen=True)
class Alone:
    """The trials of a search as runs of their own, in processes beside one another."""

    desk: Desk
    recipes: list[str]
    names: "itertools.count[int]" = field(default_factory=itertools.count)

    def __call__(self) -> int:
        number = next(self.names)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._train, self.recipes, (f"alone-{number}-{one}" for one in range(len(self.recipes)))))
        return 1

    def _train(self, recipe: str, name: str) -> None:
        options = ("--data", self.desk.dataset, "--out", str(self.desk.folder / name), "--workers", "0")
        self.desk.run(*patchloom("train", recipe, *options), **ONE_THREAD)


def write_trials(desk: Desk, search: str) -> list[str]:
    """The paths of the recipes that a search plans."""
    planned = plan_trials(*load_search(search), open_dataset(desk.dataset))
    return [desk.write_recipe(f"trial-{number}", trial.recipe) for number, trial in enumerate(planned) if trial.recipe]
