"""The run folder: created for a new run, checked when a run is resumed."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.checkpoints import check_saving
from patchloom.models.denoiser import build_denoiser
from patchloom.pipelines.train.checkpointer import newest_checkpoint
from patchloom.pipelines.train.initial_weights import checked_initial_weights
from patchloom.pipelines.train.mlflow_run import ensure_mlflow_run
from patchloom.pipelines.train.node_copies import command_copy
from patchloom.pipelines.train.resuming import RECIPE_FILE, check_continues, differing_keys
from patchloom.platform.dataset.prepared import Dataset
from patchloom.platform.files.fence import fenced
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.files.storage import locked, write_atomic
from patchloom.platform.progress import say
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe, recipe_yaml
from patchloom.platform.records.run import RUN_FILE, RunCard
from patchloom.platform.tracking.client import is_reachable
from patchloom.platform.tracking.origin import code_commit, command_line
from patchloom.platform.tracking.store import shown_uri
from patchloom.redaction import redacted


@dataclass(frozen=True)
class OpenRun:
    """An open run folder.

    Args:
        path: the folder on this machine; for a remote run a copy without tensors.
        address: the folder itself, which may be remote.
        ensure_run: finds or creates the MLflow run, and returns its id.
        mlflow_answers: whether the tracking store answers now.
        owner: who holds the fence of a remote folder.
    """

    path: Path
    address: Folder
    ensure_run: Callable[[], str]
    mlflow_answers: bool
    owner: str

    @property
    def is_finished(self) -> bool:
        """Whether the model is written, and is not that of a shorter run that goes on."""
        model = self.path / "model"
        return (model / "model.json").is_file() and is_model_of(model, load_recipe(self.path / RECIPE_FILE))


@contextmanager
def open_run_folder(
    address: Folder,
    recipe: Recipe,
    card: ModelCard,
    dataset: Dataset,
    resume: bool,
    parent_run: str | None,
    run_name: str | None = None,
) -> Iterator[OpenRun]:
    """Lock a run folder, and create it or check that it belongs to this recipe and dataset.

    Raises:
        UserError: the folder contains another run or something else, or is in use, `resume` is missing, or the initial
            weights do not fit.
    """
    check_output_folder(address, "run", RUN_FILE, {RECIPE_FILE: recipe_yaml(recipe)})
    with fenced(address) as owner, command_copy(address, owner) as path, locked(path):
        is_new = not (path / RUN_FILE).is_file()
        if not is_new:
            _check_same(path, address, recipe, dataset, card, resume)
        answers = is_reachable()
        if recipe.train.init_from is not None and newest_checkpoint(path) is None:
            copy_weights = checked_initial_weights(address, recipe.train.init_from, card.denoiser)
        else:
            copy_weights = None
        if is_new:
            _check_backbone(card)
            _write_recipe(path, address, recipe)
            _write_card(path, address, _new_card(dataset, card))
        if copy_weights is not None:  # after the card, by which the folder is known as a run
            copy_weights()
        ensure_run = functools.partial(ensure_mlflow_run, path, address, parent_run, run_name)
        if answers and address.is_remote:  # before a worker copies run.json, and sends it back without the run's id
            ensure_run()
        if not answers:
            say(f"  MLflow at {shown_uri()} does not answer: the run continues, and its lines are sent later")
        yield OpenRun(path, address, ensure_run, answers, owner)


def _check_same(path: Path, address: Folder, recipe: Recipe, dataset: Dataset, model: ModelCard, resume: bool) -> None:
    """Raise UserError unless the folder contains a run of this dataset and recipe, or of a shorter one."""
    if not resume:
        raise UserError(f"{address} contains a run: pass --resume to continue it, or choose another --out")
    card = RunCard.read(path)
    if card.kind != "train":
        raise UserError(f"{address} contains a run of `patchloom {card.kind} train`: choose another --out")
    if card.dataset_fingerprint != dataset.fingerprint:
        raise UserError(
            f"{address} was started with another dataset: fingerprint {card.dataset_fingerprint[:12]} "
            f"({card.dataset}) in the run and {dataset.fingerprint[:12]} ({dataset.address}) here: pass the dataset of "
            "the run, or a new --out"
        )
    if card.base_sha256 != (base := model.denoiser.network_options.get("base_sha256")):
        raise UserError(
            f"{address} was started with weights of model.base with sha256 {str(card.base_sha256)[:12]}, and those of "
            f"{recipe.model.base} have {str(base)[:12]}: set PATCHLOOM_BASE_MODEL to the folder of the former, or "
            "pass a new --out"
        )
    begun = load_recipe(path / RECIPE_FILE)
    check_continues(address, begun, recipe)
    if differing_keys(begun, recipe):  # only the length, as was checked
        _make_longer(path, address, recipe)


def _check_backbone(card: ModelCard) -> None:
    """Raise UserError for a backbone that could not be saved at the end. The built-in networks can."""
    if ":" in card.denoiser.network:
        try:
            check_saving(build_denoiser(card.denoiser))
        except ValueError as error:
            raise UserError(f"model.backbone {card.denoiser.network}: {error}: change its state_dict") from None


def _make_longer(path: Path, address: Folder, recipe: Recipe) -> None:
    """Give a run a longer recipe. It continues from its newest checkpoint, and keeps its model until the new one."""
    if (path / "model" / "model.json").is_file() and newest_checkpoint(path) is None:
        raise UserError(f"{address} has no checkpoint to continue from: start a new run with another --out")
    say(f"  {address} continues to {recipe.train.images:,} images")
    _write_recipe(path, address, recipe)
    if command := redacted(command_line()):
        card = RunCard.read(path)
        _write_card(path, address, card.model_copy(update={"continued": [*card.continued, command]}))


def is_model_of(model: Path, recipe: Recipe) -> bool:
    """Whether a model folder is of this recipe."""
    return not (model / RECIPE_FILE).is_file() or not differing_keys(load_recipe(model / RECIPE_FILE), recipe)


def _write_recipe(path: Path, address: Folder, recipe: Recipe) -> None:
    write_atomic(path / RECIPE_FILE, recipe_yaml(recipe))
    if address.is_remote:
        address.put(path / RECIPE_FILE, RECIPE_FILE)


def _new_card(dataset: Dataset, model: ModelCard) -> RunCard:
    base = model.denoiser.network_options.get("base_sha256")
    return RunCard(
        format_version=RunCard.FORMAT,
        kind="train",
        run_id=None,
        dataset=dataset.address,
        dataset_fingerprint=dataset.fingerprint,
        code_version=__version__,
        code_commit=code_commit(),
        command=redacted(command_line()),
        **({"base_sha256": base} if base else {}),
    )


def _write_card(path: Path, address: Folder, card: RunCard) -> None:
    card.write(path)
    if address.is_remote:
        address.put(path / RUN_FILE, RUN_FILE)
