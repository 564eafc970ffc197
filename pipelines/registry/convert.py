"""Convert: import and export models, and make averages of weights after a run."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.autoencoder import copy_autoencoder
from patchloom.models.cards import AutoencoderCard, AverageCard, ImportCard, ModelCard
from patchloom.models.checkpoints import (
    load_model,
    read_card,
    read_edm_snapshot,
    read_profile,
    save_model,
    verified_card,
)
from patchloom.models.controlnet import ControlNetwork
from patchloom.models.denoiser import skeleton
from patchloom.models.ema import PowerProfile, combine, reconstruction
from patchloom.models.normalisation import pixel_normalisation
from patchloom.pipelines.prepare.encoders import fetch_autoencoder
from patchloom.pipelines.registry.hub_card import UNKNOWN_LICENSE, check_license, write_hub_card
from patchloom.pipelines.train.checkpointer import without_tensors
from patchloom.platform.files.cache import working_copy
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import file_sha256, local_path, make_folder, whole_folder
from patchloom.platform.progress import say
from patchloom.platform.tracking.registry import fetch_model

PIXEL_CHANNELS = (1, 3)
MODEL_CARD = "model.json"


def import_model(snapshot: str, out: str, autoencoder: str | None = None) -> Path:
    """Turn an EDM or Patch Diffusion snapshot (`.pkl`) into a model folder. No code in the file is run.

    Args:
        snapshot: the file, or a folder that `export_model` wrote, which is verified and copied.
        out: the new model folder; may be remote.
        autoencoder: for a model of latents, its autoencoder: a diffusers folder, `models:/NAME/VERSION` or a Hugging
            Face name.

    Returns:
        The model folder; for a remote one a local copy.

    Raises:
        UserError: the file is missing, the autoencoder is missing or does not fit, or the folder is not empty.
        CheckpointError: the file is not a snapshot, or names a class or function that a snapshot does not need.

    Example:
        folder = patchloom.import_model("network-snapshot.pkl", "imported")
        denoiser = patchloom.load_model(folder)
    """
    path = local_path(snapshot)
    if (path / "model.json").is_file():
        return export_model(snapshot, out)
    if not path.is_file():
        raise UserError(f"{path} is not a file: give an EDM snapshot (network-snapshot-*.pkl) or a model folder")
    folder = _new_folder(out)
    denoiser, config = read_edm_snapshot(path)
    normalisation, encoder, card = pixel_normalisation(denoiser.channels), None, None
    if autoencoder is not None:
        encoder, card = _fitting_autoencoder(autoencoder, path, denoiser.channels)
        normalisation = card.normalisation()
    elif denoiser.channels not in PIXEL_CHANNELS:
        raise UserError(
            f"{path} has {denoiser.channels} channels, so it is a model of latents: give --autoencoder, the "
            "autoencoder that encoded them"
        )
    with _written(folder) as partial:
        if encoder is not None:
            copy_autoencoder(encoder, partial / "autoencoder")
        model_card = ModelCard(
            name=path.stem,
            denoiser=config,
            normalisation=normalisation,
            autoencoder=card,
            class_names=tuple(str(number) for number in range(denoiser.classes)),
            label_dropout=0.0,  # neither EDM nor the released Patch Diffusion drops labels
            imported_from=ImportCard(file=path.name, sha256=file_sha256(path)),
            code_version=__version__,
        )
        save_model(partial, denoiser, model_card)
    say(
        f"  {path.name}: {config.title}, {denoiser.resolution} pixels, {denoiser.channels} channels -> {folder}",
        is_result=True,
    )
    return _place_of(folder)


def _fitting_autoencoder(reference: str, snapshot: Path, channels: int) -> tuple[Path, AutoencoderCard]:
    """Fetch the autoencoder of a snapshot; raises UserError if its latents have another number of channels."""
    folder, card = fetch_autoencoder(reference)
    if card.latent_channels != channels:
        raise UserError(
            f"{snapshot} has {channels} channels and latents of {reference} have {card.latent_channels}: give the "
            "autoencoder that encoded the training data"
        )
    return folder, card


def export_model(model: str, out: str, *, diffusers: bool = False, license_id: str = UNKNOWN_LICENSE) -> Path:
    """Verify a model and copy its folder, as safetensors and JSON, or write the ControlNet in it for diffusers.

    The new folder has a model card, README.md, in the format of the Hugging Face Hub: it can be uploaded as it is.

    Args:
        model: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model`, or a model or run folder.
        out: the new folder; may be remote.
        diffusers: write a folder that `diffusers.ControlNetModel.from_pretrained` loads. Its control image has the
            condition in [0, 1] and, for a model with coordinates, the channels x and y of `coordinate_grid`.
        license_id: the license of the weights for the model card, an identifier of the Hub such as "cc-by-4.0".

    Returns:
        The new folder; for a remote one a local copy.

    Raises:
        UserError: there is no such model, the folder is not empty, it is for diffusers and the model no ControlNet,
            or the license is no identifier.
        CheckpointError: the weights do not match their checksum.

    Example:
        folder = patchloom.export_model("models:/my-model@champion", "exported")
    """
    check_license(license_id)
    folder = _new_folder(out)
    fetched = fetch_model(model)
    card = verified_card(fetched.folder)
    if diffusers:
        with _written(folder) as partial:
            _write_controlnet(fetched.folder, card, partial)
            write_hub_card(partial, fetched, card, license_id, diffusers=True)
        say(f"  {card.name} -> {folder}; read it with diffusers.ControlNetModel.from_pretrained", is_result=True)
        return _place_of(folder)
    with _written(folder) as partial:
        shutil.copytree(fetched.folder, partial, dirs_exist_ok=True)
        write_hub_card(partial, fetched, card, license_id, diffusers=False)
    say(f"  {card.name} -> {folder}/model.safetensors; read it with safetensors.torch.load_file", is_result=True)
    return _place_of(folder)


def _write_controlnet(model: Path, card: ModelCard, folder: Path) -> None:
    """Write the ControlNet of a model in the format of diffusers. Its base is not needed."""
    network = skeleton(card.denoiser).model
    if not isinstance(network, ControlNetwork):
        raise UserError(f"{card.name} is a {card.denoiser.title}, and only ControlNets are exported for diffusers")
    weights = load_file(model / "model.safetensors")
    network.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()}, assign=True)
    network.controlnet.save_pretrained(folder)


def average_model(run: str, out: str, sigma_rel: float) -> Path:
    """Make the model of another EMA length after the run, from the power-function averages that it kept (EDM2).

    Args:
        run: the folder of a finished run whose recipe has `snapshot_every_images` in `ema`; may be remote.
        out: the new model folder; may be remote.
        sigma_rel: width of the average relative to the length of the run, between 0 and 0.288.

    Returns:
        The model folder; for a remote one a local copy.

    Raises:
        UserError: the run is not finished or kept no averages, the width is out of range, or the folder is not empty.

    Example:
        folder = patchloom.average_model("run", "wider", sigma_rel=0.15)
    """
    folder = _new_folder(out)
    source = local_copy(run, without_tensors)
    if not (source / "model" / "model.json").is_file():
        raise UserError(f"{source} is not a finished run: give the --out folder of `patchloom train`")
    card = read_card(source / "model")
    files = sorted((source / "ema").glob("*/*.safetensors"))
    if not files:
        raise UserError(f"{source} kept no averages: train with snapshot_every_images in the recipe's ema")
    try:
        wanted = PowerProfile(sigma_rel, card.images_seen or 0)
        shares = reconstruction([read_profile(file) for file in files], wanted)
    except ValueError as error:
        raise UserError(str(error)) from None
    denoiser = load_model(source / "model")
    # not strict: the snapshots have parameters only, and the model has the newest buffers
    denoiser.load_state_dict(combine((load_file(file) for file in files), shares), strict=False)
    with _written(folder) as partial:
        if (source / "model" / "recipe.yaml").is_file():
            shutil.copyfile(source / "model" / "recipe.yaml", partial / "recipe.yaml")
        if (source / "model" / "autoencoder").is_dir():
            copy_autoencoder(source / "model" / "autoencoder", partial / "autoencoder")
        average = AverageCard(sigma_rel=sigma_rel, snapshots=len(files))
        save_model(partial, denoiser, replace(card, average=average))
    say(f"  average of width {sigma_rel:g}, from {len(files)} snapshots -> {folder}", is_result=True)
    return _place_of(folder)


def _new_folder(out: str) -> Folder:
    """A missing or empty folder; raises UserError for another one."""
    folder = Folder.at(out)
    if folder.is_remote:
        is_taken = bool(folder.files())
    else:
        is_taken = folder.path.exists() and (not folder.path.is_dir() or any(folder.path.iterdir()))
    if is_taken:
        raise UserError(f"{folder} is not empty: choose a new folder")
    return folder


def _place_of(folder: Folder) -> Path:
    """A model folder on this machine; for a remote one a copy."""
    return working_copy(folder, "model") if folder.is_remote else folder.path


@contextmanager
def _written(folder: Folder) -> Iterator[Path]:
    """A temporary folder that becomes the model folder at the end of the block. A remote one gets its card last."""
    here = Folder(str(_place_of(folder)))
    if folder.is_remote:  # a model that was written to this address, and removed there, leaves a copy here
        shutil.rmtree(here.path, ignore_errors=True)
    make_folder(here.path.parent)
    with whole_folder(here.path) as partial:
        yield partial
    if folder.is_remote:
        for name in sorted(here.files(), key=lambda name: (name == MODEL_CARD, name)):
            folder.put(here.path / name, name)
