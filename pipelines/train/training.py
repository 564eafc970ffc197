"""Train: launch a run of a recipe on Ray Train (or in this process), watched and tracked."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchloom import __version__
from patchloom.errors import Stopped, UserError
from patchloom.models.augment import LABELS
from patchloom.models.backbones import allowed_backbones
from patchloom.models.cards import AutoencoderCard, DenoiserConfig, ModelCard, PatchesCard
from patchloom.models.denoiser import halvings_of
from patchloom.models.normalisation import Normalisation, pixel_normalisation
from patchloom.pipelines.train.checkpointer import newest_checkpoint, whole_checkpoints, without_tensors
from patchloom.pipelines.train.initial_weights import keep_beginning
from patchloom.pipelines.train.loop import train_worker
from patchloom.pipelines.train.mlflow_run import end_tracking, tracked
from patchloom.pipelines.train.monitor import STOP_FILE, ask_to_stop
from patchloom.platform.compute.workers import run_workers
from patchloom.platform.dataset.prepared import Dataset, open_dataset
from patchloom.platform.files.copies import ProgressFetcher, pull_folder, working_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import (
    locked,
    make_folder,
    read_json,
    write_atomic,
)
from patchloom.platform.progress import progress, say
from patchloom.platform.recipe.run_recipe import Recipe, load_recipe, recipe_yaml
from patchloom.platform.records.dataset import DatasetCard
from patchloom.platform.records.run import RUN_FILE, ProgressLine, RunCard, read_progress
from patchloom.platform.tracking.client import is_reachable, tracking_uri
from patchloom.platform.tracking.forwarder import MlflowForwarder

HEAD_WIDTH = 64
STEM_LAYERS = 3  # 1x1 convolutions of implicit coordinates, as in the released code
RECIPE_NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp": ("song", {"embedding": "positional"}),
    "ncsnpp": (
        "song",
        {
            "embedding": "fourier",
            "residual_input": True,
            "filter_taps": [1, 3, 3, 1],
            "noise_width_multiplier": 2,
        },
    ),
    "adm": ("dhariwal", {}),
}


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its folder (for a remote one this machine's copy), its MLflow run and its last progress line.

    run_id is None where MLflow did not answer from the beginning to the end; `--resume` sends the run then.
    """

    folder: Path
    run_id: str | None
    last: ProgressLine
    address: str  # the folder as other commands take it

    @property
    def model(self) -> Path:
        """The model folder of the averaged weights."""
        return self.folder / "model"


def new_model_card(recipe: Recipe, dataset: Dataset) -> ModelCard:
    """The card of the model that this recipe makes of this dataset.

    Raises:
        UserError: the recipe does not fit the dataset.
    """
    card, model = dataset.card, recipe.model
    _check_fit(recipe, dataset)
    class_names = dataset.class_names if model.class_conditional else []
    network, options = _network(recipe)
    denoiser = DenoiserConfig(
        network=network,
        network_options=options,
        resolution=card.resolution,
        channels=card.channels,
        classes=len(class_names),
        coordinates=model.coordinates,
        patch_size=model.patch_size_condition,
        sigma_data=model.sigma_data,
    )
    try:
        multiple = 2 ** halvings_of(denoiser)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    for fraction in (1.0, *(size.fraction for size in recipe.patches.sizes)):
        side = fraction * card["resolution"]
        if side != int(side) or int(side) % multiple:
            raise UserError(
                f"patches.sizes: fraction {fraction:g} of {card['resolution']} pixels is {side:g}, and the network "
                f"halves {multiple.bit_length() - 1} times; choose fractions that give a multiple of {multiple}"
            )
    return ModelCard(
        name=recipe.name,
        denoiser=denoiser,
        normalisation=_normalisation(recipe, card),
        autoencoder=AutoencoderCard.from_json(card.autoencoder.to_dict()) if card.autoencoder else None,
        class_names=tuple(class_names),
        label_dropout=model.label_dropout,
        patches=PatchesCard.from_json(recipe.patches.model_dump(mode="json")),
        dataset_fingerprint=dataset.fingerprint,
        code_version=__version__,
    )


def _network(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    """The network's name and its constructor's arguments, as `build_denoiser` takes them."""
    model = recipe.model
    if model.backbone is not None:
        return model.backbone, model.backbone_options
    network, options = RECIPE_NETWORKS[model.network]
    if network == "dhariwal":  # EDM's heads of 64 channels, or one head where there are fewer
        options = options | {"head_width": min(HEAD_WIDTH, model.width * min(model.width_multipliers))}
    return network, {
        "width": model.width,
        "width_multipliers": list(model.width_multipliers),
        "blocks": model.blocks,
        "attention": list(model.attention),
        "dropout": model.dropout,
        "stem": [model.width] * STEM_LAYERS if model.coordinates == "implicit" else [],
        "augmentation": LABELS if recipe.data.augment else 0,
        **options,
    }


def _normalisation(recipe: Recipe, card: DatasetCard) -> Normalisation:
    channels = card.channels
    if card.autoencoder is None:
        return pixel_normalisation(channels)
    if recipe.data.whiten:
        scale = tuple(recipe.model.sigma_data / std for std in card.std)
        return Normalisation("latents", tuple(card.mean), scale)
    return Normalisation("latents", (card.autoencoder.shift,) * channels, (card.autoencoder.scale,) * channels)


def _check_fit(recipe: Recipe, dataset: Dataset) -> None:
    """Raise UserError where the recipe asks of the dataset what it does not have."""
    card = dataset.card
    if recipe.model.class_conditional and not dataset.class_names:
        raise UserError(
            "model.class_conditional is true, and the dataset has no classes: set it to false, or prepare a folder "
            "whose sub-folders are the classes"
        )
    if recipe.data.mirror and card["kind"] == "latents":
        raise UserError(
            "data.mirror is true, and the mirror of a latent is not the latent of a mirror: set it to false"
        )
    if recipe.data.augment and (card["kind"] == "latents" or recipe.model.backbone):
        turned, untold = (
            "a turned latent is not the latent of a turned image",
            "a backbone takes no augmentation labels",
        )
        why = turned if card["kind"] == "latents" else untold
        raise UserError(f"data.augment is {recipe.data.augment:g}, and {why}: set it to 0")
    if not len(dataset.indices("train", recipe.data.held_out_fraction)):
        raise UserError(
            f"data.held_out_fraction {recipe.data.held_out_fraction:g} leaves no row of {len(dataset)} to train on: "
            "lower it"
        )


def train(
    recipe: Recipe | str | Path,
    dataset: str,
    out: str,
    *,
    workers: int = 1,
    min_workers: int | None = None,
    microbatch: int | None = None,
    compile: bool = False,
    profile: bool = False,
    resume: bool = False,
    parent_run: str | None = None,
    show: Callable[[ProgressLine], None] | None = None,
) -> TrainResult:
    """Train a recipe on a prepared dataset. The model is in `out/model` when the function returns.

    Args:
        recipe: a recipe, the path of a YAML file, or the name of a shipped recipe.
        dataset: a prepared dataset; may be remote.
        out: the run folder to write; may be remote.
        workers: Ray Train workers; 0 trains in this process, without Ray.
        min_workers: continue with at least this many workers after a node is lost. The steps stay the same, up to
            summation order. By default `workers`.
        microbatch: most crops on a device at once, to save memory; the batch stays the same. By default all.
        compile: compile the network for each patch size with torch.compile.
        profile: report the three most expensive parts of a step and write a trace.
        resume: continue from the newest checkpoint in `out`; a finished run returns at once.
        parent_run: the id of the MLflow run that this run is a trial of.
        show: called with each progress line, instead of showing a progress bar.

    Returns:
        The run folder, its model and its last progress line.

    Raises:
        UserError: the recipe does not fit the dataset, the folder has another run in it, or the loss diverged.
        Stopped: SIGTERM arrived; a checkpoint was written.

    Example:
        run = patchloom.train("recipe.yaml", "dataset", "run", workers=0)
        print(run.model, run.last.loss)
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if min_workers is not None and not 1 <= min_workers <= workers:
        raise UserError(f"--min-workers {min_workers} is not within 1 and --workers {workers}: lower it")
    rows = open_dataset(dataset)
    card = new_model_card(recipe, rows)
    there = Folder.at(out)
    with _run_folder(there) as folder, locked(folder):
        find_run, answers = _open_folder(folder, there, recipe, card, rows, resume, parent_run)
        if (folder / "model" / "model.json").is_file():
            say(f"{out} is finished: its model is {out}/model")
            with MlflowForwarder(folder, find_run, lambda _: None):
                pass  # lines that a store did not take while it was away are sent now
            end_tracking(folder, "FINISHED")
            return _result(folder, out)
        config = {
            "recipe": recipe.model_dump(mode="json"),
            "card": card,
            "dataset": rows.address,
            "folder": there.address,
            "backbones": allowed_backbones(),
            "microbatch": microbatch,
            "compile": compile,
            "profile": profile,
        }
        there.remove(STOP_FILE)
        status = "FAILED"
        try:
            _launch(config, folder, recipe, find_run, answers, workers, min_workers, show)
            status = "FINISHED"
        except Stopped:
            status = "KILLED"
            raise
        finally:
            end_tracking(folder, status)
    return _result(folder, out)


def _result(folder: Path, out: str) -> TrainResult:
    """What a finished run's folder says."""
    return TrainResult(folder, RunCard.read(folder).run_id, read_progress(folder)[-1], out)


@contextmanager
def _run_folder(there: Folder) -> Iterator[Path]:
    """The folder that stands for a run's on this machine; what a remote run has is fetched before and after."""
    if not there.is_remote:
        yield make_folder(there.path)
        return
    here = working_copy(there, "driver")
    pull_folder(there, here, without_tensors)
    yield here
    pull_folder(there, here, without_tensors)


def _launch(
    config: dict[str, Any],
    folder: Path,
    recipe: Recipe,
    find_run: Callable[[], str],
    answers: bool,
    workers: int,
    min_workers: int | None,
    show: Callable[[ProgressLine], None] | None,
) -> None:
    there = Folder(config["folder"])

    def work(shown: Callable[[ProgressLine], None]) -> None:
        with (
            MlflowForwarder(folder, find_run, shown, answers),
            ProgressFetcher(there, folder) if there.is_remote else nullcontext(),
        ):
            ended = run_workers(
                train_worker,
                config,
                workers,
                folder / ".ray",
                "train",
                min_workers,
                on_stop=lambda: ask_to_stop(there),
            )
        _judge(there, ended)

    if show is not None:
        work(show)
        return
    newest = newest_checkpoint(folder)
    begun = read_json(newest / "checkpoint.json") if newest else {"step": 0, "images_seen": 0}
    if newest:
        say(f"  going on from step {begun['step']:,} ({begun['images_seen']:,} images)")
    with progress(f"training {recipe.name}", recipe.train.images, "images") as meter:
        meter.begin(begun["images_seen"])

        def on_line(line: ProgressLine) -> None:
            if line.step <= begun["step"]:
                return  # written before the stop
            sizes = "  ".join(f"{size}px {loss:.3f}" for size, loss in line.loss_by_patch_size.items())
            loss = "NaN" if line.loss is None else f"{line.loss:.3f}"
            meter.update(line.images_seen, f"loss {loss} ({sizes})  {line.model_flops_utilisation:.0%} of peak")

        work(on_line)


def _judge(folder: Folder, ended: dict[str, Any]) -> None:
    """Raise where a run was stopped or came to nothing."""
    line: ProgressLine = ended["line"]
    whole = whole_checkpoints(folder)
    if ended["verdict"] == "stopped":
        if not whole:  # the disk was full
            raise Stopped(f"{folder} has no checkpoint, because none could be written: free some space and begin again")
        step = int(whole[-1].rsplit("-", 1)[-1])
        raise Stopped(f"{folder} has a checkpoint of step {step:,}: go on with --resume")
    if ended["verdict"] == "diverged":
        where = f"the newest checkpoint is {folder}/{whole[-1]}" if whole else "there is no checkpoint"
        loss = "NaN" if line.loss is None else line.loss
        raise UserError(
            f"{folder}: the loss diverged by step {line.step:,} (it was {loss}), and {where}: "
            "begin again with a lower optimizer.lr or a longer optimizer.lr_rampup_images"
        )


def _open_folder(
    folder: Path,
    there: Folder,
    recipe: Recipe,
    card: ModelCard,
    dataset: Dataset,
    resume: bool,
    parent_run: str | None,
) -> tuple[Callable[[], str], bool]:
    """Begin a run's folder, or find there the run that goes on.

    Returns what finds or begins its MLflow run, and whether MLflow answers now. What is wrong is refused before
    a run is begun.
    """
    is_new = not (folder / RUN_FILE).is_file()
    if not is_new:
        _check_same(folder, there, recipe, dataset, resume)
    answers = is_reachable()
    if recipe.train.init_from is not None and newest_checkpoint(folder) is None:
        keep_beginning(there, recipe.train.init_from, card.denoiser)
    if is_new:
        _write_cards(folder, there, recipe, dataset)
    find_run = functools.partial(tracked, folder, there, parent_run)
    if answers and there.is_remote:  # before a worker copies run.json, which it would send back without the run's id
        find_run()
    if not answers:
        say(f"  MLflow at {tracking_uri()} does not answer: the run goes on without it, and is sent when it does")
    return find_run, answers


def _check_same(folder: Path, there: Folder, recipe: Recipe, dataset: Dataset, resume: bool) -> None:
    """Refuse to mix two runs."""
    if not resume:
        raise UserError(f"{there} holds a run: give --resume to go on with it, or choose another folder")
    if RunCard.read(folder).dataset_fingerprint != dataset.fingerprint:
        raise UserError(f"{there} was trained on another dataset than {dataset.address}: give the same, or a new --out")
    if load_recipe(folder / "recipe.yaml") != recipe:
        raise UserError(f"{there} was begun with another recipe ({there}/recipe.yaml): give the same, or a new --out")


def _write_cards(folder: Path, there: Folder, recipe: Recipe, dataset: Dataset) -> None:
    write_atomic(folder / "recipe.yaml", recipe_yaml(recipe))
    RunCard(
        format_version=RunCard.FORMAT,
        kind="train",
        run_id=None,
        dataset=dataset.address,
        dataset_fingerprint=dataset.fingerprint,
        code_version=__version__,
    ).write(folder)
    if there.is_remote:
        for name in ("recipe.yaml", RUN_FILE):
            there.put(folder / name, name)
