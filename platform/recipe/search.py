"""Searches: which settings of a recipe are tried, and what each may spend, as one YAML file."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from patchloom.errors import UserError
from patchloom.platform.recipe.run_recipe import Recipe, find_config, load_recipe
from patchloom.platform.recipe.sections import Count, Fraction, Positive, Section, checked, read_yaml

KINDS = ("grid", "choice", "uniform", "loguniform", "randint")
COSTS = ("images", "updates", "flops", "seconds")
SHARE = "budget.share"  # in a space: the fraction of the budget that a trial spends, for searches of cost itself
SCHEDULE, PROGRESSIVE = "patches.schedule", "progressive"


class Values(Section):
    """The values that a key takes: each of a grid, or drawn ones; perhaps only where other keys have certain values."""

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[Positive, Positive] | None = None
    randint: tuple[int, int] | None = Field(None, description="Both ends are drawn, too")
    when: dict[str, Any] = Field({}, description="Other keys of the space, with a value or a list of values")

    @model_validator(mode="after")
    def _one_kind(self) -> "Values":
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise PydanticCustomError("values", f"give exactly one of {', '.join(KINDS)}, not {len(given)}")
        low, high = self._ends
        if not low < high:
            raise PydanticCustomError("values", f"{given[0]}: {low:g} to {high:g} is no range: put the lower end first")
        return self

    @property
    def _ends(self) -> tuple[float, float]:
        return self.uniform or self.loguniform or self.randint or (0, 1)

    @property
    def is_drawn(self) -> bool:
        """Whether its values come from a draw."""
        return self.grid is None

    def options(self, luck: random.Random) -> tuple[Any, ...]:
        """Every value of a grid, or one drawn value."""
        if self.grid is not None:
            return self.grid
        if self.choice is not None:
            return (luck.choice(self.choice),)
        if self.randint is not None:
            return (luck.randint(*self.randint),)
        low, high = self._ends
        if self.uniform is not None:
            return (luck.uniform(low, high),)
        return (math.exp(luck.uniform(math.log(low), math.log(high))),)

    def suggested(self, key: str, adviser: Any) -> Any:
        """One value that an Optuna trial suggests; the values of a grid or a choice by their positions."""
        listed = self.listed
        if listed:
            return listed[adviser.suggest_categorical(key, list(range(len(listed))))]
        if self.randint is not None:
            return adviser.suggest_int(key, *self.randint)
        low, high = self._ends
        return adviser.suggest_float(key, low, high, log=self.loguniform is not None)

    @property
    def listed(self) -> tuple[Any, ...]:
        """Every value, where they stand in a list."""
        return self.grid or self.choice or ()

    def applies(self, setting: dict[str, Any]) -> bool:
        """Whether the keys that it hangs on have their values in this setting."""
        return all(
            setting.get(key) in (wanted if isinstance(wanted, list) else [wanted]) for key, wanted in self.when.items()
        )


class Budget(Section):
    """What every trial may spend, in exactly one of these."""

    images: Count | None = None
    updates: Count | None = None
    flops: Positive | None = None
    seconds: Positive | None = Field(None, description="Of training, by a few steps measured before the search starts")

    @model_validator(mode="after")
    def _one_of_them(self) -> "Budget":
        given = [name for name in COSTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError("budget", f"give exactly one of {', '.join(COSTS)}, not {len(given)}")
        return self


class Scheduler(Section):
    """Early stopping: asha keeps the best 1/reduction of the trials at each rung (Li et al. 2018)."""

    kind: Literal["none", "asha"] = "none"
    grace: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="Share of its own budget that every trial spends"
    )
    reduction: Annotated[int, Field(ge=2)] = 3


class Final(Section):
    """What is measured on samples of every finished trial, by `patchloom sample` and `patchloom evaluate`."""

    features: str = Field("inception", description="As of `patchloom evaluate`: inception, colours, a file ...")
    samples: Annotated[int, Field(ge=2)] = 256
    steps: Count = 18


class Search(Section):
    """Many runs of one recipe: settings of its keys at an equal budget, compared by one number."""

    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    name: Annotated[str, Field(min_length=1)]
    recipe: str
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Of the draws; trials take the recipe's")
    set: dict[str, Any] = Field({}, description="Recipe keys that only the trials have, such as shorter ramps")
    of_budget: dict[str, Fraction] = Field(
        {}, description="Keys in images, as fractions of the trial's own length: ramps, half-lives"
    )
    space: Annotated[dict[str, Values], Field(min_length=1)]
    also: tuple[dict[str, Any], ...] = Field((), description="Settings beside those of the space, as they are")
    searcher: Literal["grid", "tpe", "frontier"] = Field(
        "grid", description="Every grid beside draws; Optuna's TPE; or TPE for the metric and the FLOPs spent at once"
    )
    trials: Count = Field(
        1, description="grid: how many times what is drawn is drawn, each time with every grid; else trials in all"
    )
    repeats: Count = Field(1, description="Trials of each setting, with seeds that follow one another")
    budget: Budget
    metric: Literal["held_out_loss", "preview_frechet_distance", "final_distance"] = "held_out_loss"
    scheduler: Scheduler = Scheduler()
    final: Final | None = None

    @model_validator(mode="after")
    def _space_makes_sense(self) -> "Search":
        known: list[str] = []
        for key, values in self.space.items():
            for other in values.when:
                if other not in known:
                    raise PydanticCustomError(
                        "when", f"space.{key}.when: {other} does not stand before {key} in the space: move it there"
                    )
            known.append(key)
        if self.searcher == "grid" and self.trials > 1 and not any(value.is_drawn for value in self.space.values()):
            raise PydanticCustomError(
                "trials", f"trials: {self.trials} draws were asked and nothing is drawn: use repeats, or a choice"
            )
        twice = [key for key in self.of_budget if key in self.space or key in self.set]
        if twice:
            raise PydanticCustomError("of_budget", f"of_budget.{twice[0]}: is in the space or in set too: give it once")
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Search":
        for path, is_wrong, problem in (
            ("repeats", self.is_advised and self.repeats > 1,
             f"searcher {self.searcher} tries settings once: set repeats: 1, and repeat the best with a grid"),
            ("also", self.is_advised and self.also,
             f"searcher {self.searcher} finds its settings by itself: leave them out, or set searcher: grid"),
            ("scheduler", self.searcher == "frontier" and self.stops_early,
             "asha ranks by one number and a frontier has two: set kind: none"),
            ("scheduler", self.stops_early and SHARE in self.space,
             f"asha compares trials at equal shares of one budget, and {SHARE} gives them different ones: take it out"),
            ("metric", self.metric == "final_distance" and self.final is None,
             "final_distance is measured by `final`: add one, such as final: {features: inception, samples: 256}"),
            ("metric", self.metric == "final_distance" and (self.is_advised or self.stops_early),
             "final_distance is measured when all trials have ended, too late to steer them: choose another"),
        ):  # fmt: skip
            if is_wrong:
                raise PydanticCustomError("parts", f"{path}: {problem}")
        return self

    @property
    def is_advised(self) -> bool:
        """Whether settings follow from what earlier trials came to."""
        return self.searcher != "grid"

    @property
    def stops_early(self) -> bool:
        """Whether trials that are behind are stopped."""
        return self.scheduler.kind != "none"

    def check_brackets(self, base: Recipe) -> None:
        """Refuse to stop trials early by numbers that one of them cannot have yet; raises UserError.

        A progressive schedule sees full-size images only at its end, later for a smaller p, and the metric is
        of full-size images.
        """
        if not self.stops_early:
            return
        values, fixed = self.space.get(SCHEDULE), self.set.get(SCHEDULE, base.patches.schedule)
        schedules = {*(values.listed if values else [fixed]), *(setting.get(SCHEDULE, fixed) for setting in self.also)}
        varied = [
            key for key in (*self.space, *(key for one in self.also for key in one)) if key.startswith("patches.")
        ]
        if PROGRESSIVE in schedules and varied:
            raise UserError(
                "scheduler.kind: asha would compare trials half-way, and a progressive schedule sees full-size images "
                f"only at its end, so that {varied[0]} would be judged by when they come: set kind: none, or search "
                "progressive schedules by themselves with `patches` fixed"
            )

    def suggested(self, adviser: Any) -> dict[str, Any]:
        """A setting that an Optuna trial suggests."""
        setting: dict[str, Any] = {}
        for key, values in self.space.items():
            if values.applies(setting):
                setting[key] = values.suggested(key, adviser)
        return setting

    def settings(self) -> list[dict[str, Any]]:
        """Every setting of a grid search once, in order: a pure function of the search."""
        luck = random.Random(self.seed)
        found: list[dict[str, Any]] = []
        for _ in range(self.trials):  # a draw stands beside every combination of the grids, so that these compare
            options = {key: values.options(luck) for key, values in self.space.items()}
            found += [setting for setting in self._combinations({}, options) if setting not in found]
        return found + [setting for setting in self.also if setting not in found]

    def drawn(self, luck: random.Random) -> dict[str, Any]:
        """One setting, drawn from all of the space."""
        options = {key: (luck.choice(values.options(luck)),) for key, values in self.space.items()}
        return next(self._combinations({}, options))

    def _combinations(self, setting: dict[str, Any], options: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
        if not options:
            yield setting
            return
        key, *others = options
        rest = {other: options[other] for other in others}
        if not self.space[key].applies(setting):
            yield from self._combinations(setting, rest)
            return
        for value in options[key]:
            yield from self._combinations({**setting, key: value}, rest)


def load_search(name: str | Path) -> tuple[Search, Recipe]:
    """Read a search and the recipe that it starts from, which lies beside it or is a shipped one."""
    path = find_config(str(name))
    values = read_yaml(path)
    if "space" not in values and "train" in values:
        raise UserError(f"{name} is a recipe: train it with `patchloom train`, or give a search (with a `space`)")
    search = checked(Search, values)
    beside = path.parent / search.recipe
    base = load_recipe(beside if beside.is_file() else search.recipe)
    search.check_brackets(base)
    return search, base
