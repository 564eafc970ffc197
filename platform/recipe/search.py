"""Searches: one YAML file that defines which settings of a recipe are tried, and the budget of each trial."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from patchloom.errors import UserError
from patchloom.platform.recipe.files import ConfigFile
from patchloom.platform.recipe.run_recipe import Recipe, check_recipe, recipe_values
from patchloom.platform.recipe.sections import Count, Fraction, Positive, Section, checked

if TYPE_CHECKING:
    from optuna import Trial

VALUE_KINDS = ("grid", "choice", "uniform", "loguniform", "randint")
BUDGET_UNITS = ("images", "updates", "flops", "seconds")
BUDGET_SHARE = "budget.share"  # a key of a space: the fraction of the budget that a trial spends
SCHEDULE_KEY = "patches.schedule"

Setting = dict[str, JsonValue]  # values by recipe key, such as {"patches.p": 0.25}


class SearchedValues(Section):
    """The values of a key: a grid, or random draws. With `when`, only for certain values of other keys."""

    grid: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    choice: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[Positive, Positive] | None = None
    randint: tuple[int, int] | None = Field(None, description="Includes both ends")
    when: dict[str, JsonValue] = Field({}, description="Earlier keys of the space, each with a value or list of values")

    @model_validator(mode="after")
    def _has_one_kind(self) -> "SearchedValues":
        given = [kind for kind in VALUE_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise PydanticCustomError("values", f"give exactly one of {', '.join(VALUE_KINDS)}; found {len(given)}")
        low, high = self._ends
        if not low < high:
            raise PydanticCustomError("values", f"{given[0]}: {low:g} to {high:g} is no range; put the lower end first")
        return self

    @property
    def _ends(self) -> tuple[float, float]:
        return self.uniform or self.loguniform or self.randint or (0, 1)

    @property
    def is_drawn(self) -> bool:
        """Whether the values are random draws."""
        return self.grid is None

    def options(self, generator: random.Random) -> tuple[JsonValue, ...]:
        """All values of a grid, or one random draw."""
        if self.grid is not None:
            return self.grid
        if self.choice is not None:
            return (generator.choice(self.choice),)
        if self.randint is not None:
            return (generator.randint(*self.randint),)
        low, high = self._ends
        if self.uniform is not None:
            return (generator.uniform(low, high),)
        return (math.exp(generator.uniform(math.log(low), math.log(high))),)

    def suggest(self, key: str, trial: "Trial") -> JsonValue:
        """The value that an Optuna trial suggests. Values of a grid or a choice are suggested by their positions."""
        listed = self.listed
        if listed:
            return listed[int(trial.suggest_categorical(key, list(range(len(listed)))))]
        if self.randint is not None:
            return int(trial.suggest_int(key, *self.randint))
        low, high = self._ends
        return float(trial.suggest_float(key, low, high, log=self.loguniform is not None))

    @property
    def listed(self) -> tuple[JsonValue, ...]:
        """The values of a grid or a choice."""
        return self.grid or self.choice or ()

    def applies(self, setting: Setting) -> bool:
        """Whether the keys in `when` have their values in this setting."""
        return all(
            setting.get(key) in (wanted if isinstance(wanted, list) else [wanted]) for key, wanted in self.when.items()
        )


class TrialBudget(Section):
    """What each trial may spend, in exactly one of these units."""

    images: Count | None = None
    updates: Count | None = None
    flops: Positive | None = None
    seconds: Positive | None = Field(None, description="Of training, estimated from a few steps before the search")

    @property
    def words(self) -> str:
        """`4 TFLOP`, `20,000 images`."""
        if self.flops is not None:
            return f"{self.flops / 1e12:,.4g} TFLOP"
        unit, amount = next((unit, amount) for unit, amount in self if amount is not None)
        return f"{amount:,.10g} {unit}"

    @model_validator(mode="after")
    def _has_one_unit(self) -> "TrialBudget":
        given = [name for name in BUDGET_UNITS if getattr(self, name) is not None]
        if len(given) != 1:
            raise PydanticCustomError("budget", f"give exactly one of {', '.join(BUDGET_UNITS)}; found {len(given)}")
        return self


class SchedulerSection(Section):
    """Early stopping: asha keeps the best 1/reduction of the trials at each rung (Li et al. 2018)."""

    kind: Literal["none", "asha"] = "none"
    grace: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.25, description="Fraction of its budget that each trial spends before it can be stopped"
    )
    reduction: Annotated[int, Field(ge=2)] = 3


class FinalEvaluation(Section):
    """Samples of each finished trial, their distance as by `patchloom evaluate`, and how many are memorised."""

    features: str = Field("inception", description="As in `patchloom evaluate`: inception, colours, a file ...")
    samples: Annotated[int, Field(ge=2)] = 256
    steps: Count = 18


class Search(Section):
    """Trials of one recipe with different settings and an equal budget, compared by one metric."""

    format_version: Annotated[int, Field(ge=1, le=1)] = 1
    name: Annotated[str, Field(min_length=1)]
    recipe: str
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the draws; trials use the seed of the recipe")
    set: dict[str, JsonValue] = Field({}, description="Recipe keys for all trials, such as shorter ramps")
    of_budget: dict[str, Fraction] = Field(
        {}, description="Keys in images, as fractions of the length of the trial: ramps, half-lives"
    )
    space: Annotated[dict[str, SearchedValues], Field(min_length=1)]
    also: tuple[dict[str, JsonValue], ...] = Field((), description="Further settings, after those of the space")
    searcher: Literal["grid", "tpe", "frontier"] = Field(
        "grid", description="grid: all grids and draws; tpe: Optuna's TPE; frontier: TPE for both the metric and FLOPs"
    )
    trials: Count = Field(
        1, description="grid: number of random draws, each with all grids; tpe and frontier: number of trials"
    )
    repeats: Count = Field(1, description="Trials of each setting, with consecutive seeds")
    budget: TrialBudget
    equal_costs: tuple[Literal["images", "updates", "flops"], ...] = Field(
        (),
        description="Further units in which settings are compared, by trials as long as the cheapest one in that unit",
    )
    metric: Literal["held_out_loss", "preview_frechet_distance", "final_distance"] = "held_out_loss"
    scheduler: SchedulerSection = SchedulerSection()
    final: FinalEvaluation | None = None

    @model_validator(mode="after")
    def _space_is_valid(self) -> "Search":
        known: list[str] = []
        for key, values in self.space.items():
            for other in values.when:
                if other not in known:
                    raise PydanticCustomError("when", f"space.{key}.when: {other} must come before {key} in the space")
            known.append(key)
        if self.searcher == "grid" and self.trials > 1 and not any(value.is_drawn for value in self.space.values()):
            raise PydanticCustomError(
                "trials", f"trials: {self.trials} draws, but the space has only grids; use repeats, or a choice"
            )
        twice = [key for key in self.of_budget if key in self.space or key in self.set]
        if twice:
            raise PydanticCustomError("of_budget", f"of_budget.{twice[0]}: is also in space or set; give it once")
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Search":
        for path, is_wrong, problem in (
            ("repeats", self.is_adaptive and self.repeats > 1,
             f"searcher {self.searcher} tries each setting once; set repeats: 1, and repeat the best with a grid"),
            ("also", self.is_adaptive and self.also,
             f"searcher {self.searcher} chooses its own settings; remove `also`, or set searcher: grid"),
            ("scheduler", self.searcher == "frontier" and self.stops_early,
             "asha ranks by one metric and a frontier has two; set kind: none"),
            ("scheduler", self.stops_early and BUDGET_SHARE in self.space,
             f"asha compares trials at equal budgets, which {BUDGET_SHARE} changes; remove it"),
            ("equal_costs", self.equal_costs and (self.is_adaptive or self.stops_early or BUDGET_SHARE in self.space),
             f"all trials must spend the budget; remove equal_costs, or tpe, frontier, asha and {BUDGET_SHARE}"),
            ("metric", self.metric == "final_distance" and self.final is None,
             "final_distance needs `final`, such as final: {features: inception, samples: 256}"),
            ("metric", self.metric == "final_distance" and (self.is_adaptive or self.stops_early),
             "final_distance is measured after all trials; for tpe, frontier or asha, choose another metric"),
        ):  # fmt: skip
            if is_wrong:
                raise PydanticCustomError("parts", f"{path}: {problem}")
        return self

    @property
    def is_adaptive(self) -> bool:
        """Whether settings depend on the results of earlier trials."""
        return self.searcher != "grid"

    @property
    def stops_early(self) -> bool:
        """Whether trials with a worse metric are stopped early."""
        return self.scheduler.kind != "none"

    def check_early_stopping(self, base: Recipe) -> None:
        """Check that trials which asha compares half-way have a comparable metric.

        A progressive schedule trains on full-size images only at the end, later for a smaller p, and the metric is
        measured on full-size images.

        Raises:
            UserError: asha would compare progressive schedules with different patches.
        """
        if not self.stops_early:
            return
        values, fixed = self.space.get(SCHEDULE_KEY), self.set.get(SCHEDULE_KEY, base.patches.schedule)
        also = [setting.get(SCHEDULE_KEY, fixed) for setting in self.also]
        varied = [key for keys in ([*self.space], *self.also) for key in keys if key.startswith("patches.")]
        if varied and "progressive" in (*(values.listed if values else [fixed]), *also):
            raise UserError(
                f"scheduler.kind: asha cannot compare progressive schedules with different {varied[0]}, because they "
                "train on full-size images only at the end; set kind: none, or keep `patches` fixed"
            )

    def suggest(self, trial: "Trial") -> Setting:
        """The setting that an Optuna trial suggests."""
        setting: Setting = {}
        for key, values in self.space.items():
            if values.applies(setting):
                setting[key] = values.suggest(key, trial)
        return setting

    def settings(self) -> list[Setting]:
        """All settings of a grid search in order, each once: a pure function of the search."""
        generator = random.Random(self.seed)
        found: list[Setting] = []
        for _ in range(self.trials):  # each draw is combined with all grids, so that these can be compared
            options = {key: values.options(generator) for key, values in self.space.items()}
            found += [setting for setting in self._combinations({}, options) if setting not in found]
        return found + [setting for setting in self.also if setting not in found]

    def draw(self, generator: random.Random) -> Setting:
        """One random setting of the space."""
        options: dict[str, tuple[JsonValue, ...]] = {
            key: (generator.choice(values.options(generator)),) for key, values in self.space.items()
        }
        return next(self._combinations({}, options))

    def _combinations(self, setting: Setting, options: dict[str, tuple[JsonValue, ...]]) -> Iterator[Setting]:
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
    """Read a search and its recipe.

    Args:
        name: path or address of a YAML file, or name of a shipped search. Its `recipe` is a file relative to its
            folder, or the name of a shipped recipe.

    Raises:
        UserError: one of them is missing or not valid. The message names the path of each wrong key.
    """
    file = ConfigFile.find(str(name))
    values = file.read()
    if "space" not in values and "train" in values:
        raise UserError(f"{name} is a recipe, not a search (which has a `space`); train it with `patchloom train`")
    search = checked(Search, values)
    base = check_recipe(recipe_values(file.named(search.recipe)))
    search.check_early_stopping(base)
    return search, base
