"""Resuming: what a run folder knows about its run, and with which recipes the run may continue."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.copies import local_copy
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe
from patchloom.platform.records.run import RUN_FILE, RunCard
from patchloom.redaction import redacted_values

RECIPE_FILE = "recipe.yaml"
LENGTH = "train.images"
WITHOUT_EFFECT = ("data.kind", "data.resolution")  # they only give warnings, and older recipes lack them


def recipe_of_run(run: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run folder, which may be remote, with the changes of `--set`.

    Raises:
        UserError: the folder has no run of `patchloom train`, or an override is wrong.
    """
    return load_recipe(_cards_of(run) / RECIPE_FILE, overrides)


def dataset_of_run(run: str) -> str:
    """The address of the dataset that a run was started with.

    Raises:
        UserError: the folder has no run of `patchloom train`, or the run did not store the address.
    """
    dataset = RunCard.read(_cards_of(run)).dataset
    if dataset is None:
        raise UserError(f"{run}/{RUN_FILE}: no dataset is stored; pass the dataset with --data")
    return dataset


def _cards_of(run: str) -> Path:
    folder = local_copy(run, lambda name: name in (RECIPE_FILE, RUN_FILE))
    kind = RunCard.read(folder).kind
    if kind != "train":
        raise UserError(f"{run} is a run of `patchloom {kind} train`: repeat that command to continue it")
    return folder


def check_continues(run: object, recipe: Recipe, given: Recipe) -> None:
    """Check that a run may continue with a recipe: its own, or a longer one if no step depends on the length.

    Args:
        run: the run folder, for the message.
        recipe: the recipe of the run.
        given: the recipe to continue with.

    Raises:
        UserError: another key differs; the message names each key with both values.
    """
    changed = differing_keys(recipe, given)
    if changed.keys() == {LENGTH}:
        _check_longer(run, recipe, given)
    elif changed:
        values = "; ".join(f"{key} is {one} in the run and {other} here" for key, (one, other) in changed.items())
        raise UserError(
            f"{run} was started with another recipe ({run}/{RECIPE_FILE}): {values}: pass the same values, or a new "
            "--out"
        )


def _check_longer(run: object, recipe: Recipe, given: Recipe) -> None:
    lengths = f"{LENGTH} is {recipe.train.images} in the run and {given.train.images} here"
    if given.train.images < recipe.train.images:
        raise UserError(f"{run}: {lengths}, and a run cannot become shorter: pass a larger number, or a new --out")
    if recipe.patches.schedule != "stochastic":
        shares = f"patches.schedule: {recipe.patches.schedule} with shares_of: {recipe.patches.shares_of}"
        raise UserError(
            f"{run}: {lengths}, and {shares} divides the whole length among the patch sizes, so the steps that were "
            "taken would have had other sizes: start a new run with another --out"
        )


def differing_keys(recipe: Recipe, other: Recipe) -> dict[str, tuple[object, object]]:
    """The keys, such as `ema.0.halflife_images`, whose values differ, with both values; None where one has no such key.

    Keys without an effect on the training are left out.

    Args:
        recipe: one recipe.
        other: the recipe to compare it with.
    """
    one, two = (_flat_keys(redacted_values(each.model_dump(mode="json"))) for each in (recipe, other))
    keys = [key for key in one | two if key not in WITHOUT_EFFECT and one.get(key) != two.get(key)]
    return {key: (one.get(key), two.get(key)) for key in keys}


def _flat_keys(value: object, path: str = "") -> dict[str, object]:
    """Values by dotted keys, as `--set` takes them."""
    items: Iterable[tuple[object, object]]
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        items = enumerate(value)
    else:
        return {path: value}
    flat: dict[str, object] = {}
    for key, item in items:
        flat |= _flat_keys(item, f"{path}.{key}" if path else str(key))
    return flat
