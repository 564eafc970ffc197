"""Stages: the commands that reproduce a table, in order, with the FLOPs that each one is expected to need."""

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

from patchloom.models.generate import Sampling
from patchloom.pipelines.prepare.photographs import PHOTOGRAPHS, copy_photographs
from patchloom.pipelines.recipes import TWO_CORES_RATE, counted, shape_of_recipe, small_twin
from patchloom.pipelines.reproduce.paper import DATA, PaperResult, PaperTable
from patchloom.pipelines.train.dry_run import STATED_RATE
from patchloom.pipelines.train.resuming import differing_keys
from patchloom.pipelines.tune.planning import held_out_flops, plan_trials, recipe_of_setting, search_flops
from patchloom.platform.dataset.prepared import is_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe, with_values
from patchloom.platform.recipe.search import BUDGET_SHARE, load_search
from patchloom.platform.records.reproduction import Reproduction
from patchloom.platform.records.run import RUN_FILE
from patchloom.platform.records.search import SEARCH_FILE

PHOTOGRAPHS_DATA = "photographs"
SMALL_SAMPLES, FULL_SAMPLES = 256, 50_000  # of each model, where no search takes them
SMALL_STEPS = 18
SMALL_SIDE, SMALL_LATENTS_SIDE = 32, 64  # of images that are trained on as pixels, and of those that are encoded


@dataclass(frozen=True)
class Stage:
    """A command of a reproduction.

    Args:
        title: what it does.
        words: the command, after `patchloom` or another module.
        flops: what it is expected to need; 0 for a negligible amount.
        card: a file that exists once the command has begun, relative to the folder of the reproduction.
        again: the option that continues it then.
        before: writes files that it needs.
        module: what it runs.
        environment: variables that it needs, with their values.
        needs: a file without which it is left out, relative to the folder: one of a training that may fail.
    """

    title: str
    words: tuple[str, ...]
    flops: float = 0.0
    card: str = ""
    again: str = ""
    before: Callable[[], object] | None = field(default=None, compare=False)
    module: str = "patchloom"
    environment: tuple[tuple[str, str], ...] = ()
    needs: str = ""

    @property
    def command(self) -> str:
        """It as a line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        program = ["patchloom"] if self.module == "patchloom" else ["python", "-m", self.module]
        return " ".join([*settings, shlex.join([*program, *self.words])])


@dataclass(frozen=True)
class ReproductionFolder:
    """The folder of a reproduction, and what its commands have in common.

    Args:
        folder: the folder.
        asked: what is reproduced, with its options.
        workers: workers of each training at full size, and of each trial; None for the default of the commands.
    """

    folder: Folder
    asked: Reproduction
    workers: int | None = None

    def with_asked(self, asked: Reproduction) -> "ReproductionFolder":
        """It with another record."""
        return replace(self, asked=asked)

    def path(self, *names: str) -> str:
        """The address of a file or folder in it."""
        return "/".join([self.folder.address, *names])

    @property
    def with_workers(self) -> tuple[str, ...]:
        """The option of commands that train."""
        if self.workers is None:
            return ("--workers", "0") if self.asked.small else ()
        return ("--workers", str(self.workers))

    def source(self, name: str) -> str:
        """The source of data of that name."""
        if name == PHOTOGRAPHS_DATA:
            return self.path(PHOTOGRAPHS_DATA)
        return self.asked.data[name]

    def is_prepared(self, name: str) -> bool:
        """Whether the data of that name are a prepared dataset."""
        return name != PHOTOGRAPHS_DATA and is_dataset(Folder.at(self.source(name)))

    def dataset(self, name: str, latents: bool) -> str:
        """The dataset that is trained on."""
        return self.source(name) if self.is_prepared(name) and not latents else self.path("data", name)

    def reference(self, name: str, latents: bool) -> str:
        """The dataset of pixels that samples are compared with."""
        if not latents:
            return self.dataset(name, latents)
        return self.source(name) if self.is_prepared(name) else self.path("data", f"{name}-pixels")


def used_data(table: PaperTable, asked: Reproduction) -> list[str]:
    """The names of the data that are used: those that were given, or the photographs."""
    return [name for name in table.data if name in asked.data] or [PHOTOGRAPHS_DATA]


def results_on(table: PaperTable, name: str) -> list[PaperResult]:
    """The systems that are trained on data of a name; photographs take the place of the first dataset."""
    data = table.data[0] if name == PHOTOGRAPHS_DATA else name
    return [result for result in table.results if result.data == data]


def table_stages(table: PaperTable, place: ReproductionFolder) -> list[Stage]:
    """All commands that reproduce a table, each once."""
    stages: list[Stage] = []
    for name in used_data(table, place.asked):
        stages += data_stages(place, name, place.asked.small, table.latents)
        if place.asked.small and table.small_search:
            stages.append(search_stage(place, name, table.small_search, place.dataset(name, table.latents)))
        else:
            stages += _system_stages(table, place, name)
    first: dict[tuple[str, ...], Stage] = {}
    for stage in stages:
        first.setdefault(stage.words, stage)  # a model that is sampled twice is trained once
    return list(first.values())


def data_stages(
    place: ReproductionFolder, name: str, small: bool, latents: bool, condition: str = ""
) -> Iterator[Stage]:
    """Prepare data, as pixels and, where needed, as latents."""
    title = PHOTOGRAPHS_DATA if name == PHOTOGRAPHS_DATA else DATA[name].title if name in DATA else name
    side = (SMALL_LATENTS_SIDE if latents else SMALL_SIDE) if small else DATA[name].resolution
    pixels = place.reference(name, latents)
    if not place.is_prepared(name):
        options = ["--resolution", str(side), *(["--autoencoder", "none"] if side >= 256 else [])]
        options += ["--crop", "windows"] if name == PHOTOGRAPHS_DATA else []
        options += ["--crop", "dhariwal"] if name == "imagenet" and not small else []
        options += ["--condition", condition] if condition else []
        words = ("prepare", place.source(name), pixels, *options)
        if name == PHOTOGRAPHS_DATA:
            copy = partial(copy_photographs, place.folder.path / PHOTOGRAPHS_DATA)
            shown = f"{side} x {side} windows of {len(PHOTOGRAPHS)} photographs"
            yield Stage(f"Prepare {shown}", words, before=copy)
        else:
            yield Stage(f"Prepare {title} at {side} x {side} pixels", words)
    if not latents:
        return
    autoencoder = place.asked.autoencoder or (place.path("autoencoder", "model") if small else "")
    if small and not place.asked.autoencoder:
        out = place.path("autoencoder")
        yield Stage("Train a small autoencoder", ("autoencoder", "train", pixels, "--out", out, "--workers", "0"))
    encoder = ("--autoencoder", autoencoder) if autoencoder else ()
    yield Stage(f"Encode {title} as latents", ("prepare", pixels, place.path("data", name), *encoder))


def search_stage(
    place: ReproductionFolder,
    name: str,
    search: str,
    dataset: str,
    environment: tuple[tuple[str, str], ...] = (),
    folder: str | None = None,
) -> Stage:
    """Run a search on data of a name, in `folder`/search; the default folder is the name of the data."""
    definition, base = load_search(search)
    settings, folder = definition.settings(), folder or name
    trials = len(settings) * definition.repeats
    if definition.budget.seconds is None:
        shape = shape_of_recipe(recipe_of_setting(definition, base, {}))
        planned = plan_trials(definition, base, shape)
        trials = len(planned)
        recipes = [trial.recipe for trial in planned if trial.recipe]
        flops = search_flops(definition, base, shape, planned)
        flops += sum(held_out_flops(recipe, shape) for recipe in recipes)
    else:  # a plan would measure steps on this machine; the search does that where it runs
        shares = sum(float(str(setting.get(BUDGET_SHARE, 1))) for setting in settings)
        rate = TWO_CORES_RATE / 2 if place.asked.small else STATED_RATE
        recipes = [recipe_of_setting(definition, base, setting) for setting in settings] * definition.repeats
        flops = definition.budget.seconds * shares * definition.repeats * rate
    if definition.final is not None:
        flops += sum(samples_flops(recipe, definition.final.samples, definition.final.steps) for recipe in recipes)
    words = ("tune", search, "--data", dataset, "--out", place.path(folder, "search"), *place.with_workers)
    title = f"Compare {len(settings)} settings on {name}, {trials} trials"
    return Stage(title, words, flops, f"{folder}/search/{SEARCH_FILE}", "--restore", environment=environment)


def samples_flops(recipe: Recipe, samples: int, steps: int, guidance: float = 1.0, sampler: str = "heun") -> float:
    """FLOPs of sampling with a model of a recipe."""
    evaluations = Sampling(sampler=sampler, steps=steps, guidance=guidance).network_evaluations
    return samples * evaluations * float(counted(recipe, shape_of_recipe(recipe)).evaluation_flops)


def training_stage(
    place: ReproductionFolder, title: str, recipe: str, settings: Iterable[str], dataset: str, names: tuple[str, ...]
) -> Stage:
    """Train a recipe on a dataset; the run is at `names` in the folder."""
    changed = list(settings)
    loaded = load_recipe(recipe, changed)
    words = ["train", recipe, "--data", dataset, "--out", place.path(*names), *place.with_workers]
    words += [word for setting in changed for word in ("--set", setting)]
    flops = counted(loaded, shape_of_recipe(loaded)).flops
    return Stage(title, tuple(words), flops, "/".join([*names, RUN_FILE]), "--resume")


def changed_keys(result: PaperResult) -> list[str]:
    """What the recipe of a system does not have, as `--set` takes it."""
    recipe = load_recipe(result.recipe)
    changed = differing_keys(recipe, with_values(recipe, dict(result.settings)))
    return [f"{key}={value[1]}" for key, value in changed.items()]


def run_of(result: PaperResult) -> tuple[str, ...]:
    """Where the run of a system is in the folder of a reproduction; without what only changes its samples."""
    return result.slug.removesuffix(f"-guidance-{result.guidance:g}"), "run"


def samples_of(result: PaperResult) -> tuple[str, ...]:
    """Where the samples of a system are in the folder of a reproduction."""
    return result.slug, "samples"


def _system_stages(table: PaperTable, place: ReproductionFolder, name: str) -> Iterator[Stage]:
    """Train, sample and evaluate each system on its data."""
    small = place.asked.small
    samples = SMALL_SAMPLES if small else FULL_SAMPLES
    steps, churn = (SMALL_STEPS, ()) if small else (table.steps, table.churn)
    for result in results_on(table, name):
        recipe = small_twin(result.recipe) if small else result.recipe
        changed = changed_keys(result)
        run = (name, *run_of(result))
        shown = f"{result.system} on {name}"
        title = f"Train {shown}".replace(f", guidance {result.guidance:g}", "")
        yield training_stage(place, title, recipe, changed, place.dataset(name, table.latents), run)
        out = place.path(name, *samples_of(result))
        guidance = ("--guidance", f"{result.guidance:g}") if result.guidance != 1 else ()
        yield Stage(
            f"Sample {shown}",
            ("sample", place.path(*run), out, "--seeds", f"0-{samples - 1}", "--steps", str(steps), *churn, *guidance),
            samples_flops(load_recipe(recipe, changed), samples, steps, result.guidance),
        )
        reference = place.reference(name, table.latents)
        yield Stage(
            f"Measure {shown}",
            ("evaluate", out, "--reference", reference, "--features", place.asked.features),
        )
