"""Convert: models from elsewhere and to elsewhere, and averages made after the run."""

import shutil
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.cards import AverageCard, ImportCard, ModelCard
from patchloom.models.checkpoints import (
    is_pickle,
    load_model,
    read_card,
    read_edm_snapshot,
    read_profile,
    save_model,
    verified_card,
)
from patchloom.models.ema import PowerProfile, combine, reconstruction
from patchloom.models.normalisation import Normalisation, pixel_normalisation
from patchloom.pipelines.prepare.preparing import fetch_autoencoder
from patchloom.pipelines.train.checkpointer import without_tensors
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.storage import file_sha256, local_path, make_folder, whole_folder
from patchloom.platform.progress import say
from patchloom.platform.tracking.registry import fetch_model

PIXEL_CHANNELS = (1, 3)


def import_model(snapshot: str, out: str, autoencoder: str | None = None) -> Path:
    """Turn an EDM or Patch Diffusion snapshot (`.pkl`) into a model folder; nothing of the file is run.

    snapshot: the file, or a folder that `export_model` wrote, which is verified and copied.
    autoencoder: for a network of latents, the one they were encoded with (a diffusers folder or models:/...).
    Returns the folder. Raises UserError for latents without one and for a folder that is not empty, and
    CheckpointError for a file that is no snapshot or names what no snapshot needs.
    """
    path = local_path(snapshot)
    if (path / "model.json").is_file():
        return export_model(snapshot, out)
    if not path.is_file():
        raise UserError(
            f"{path} is not a file: give an EDM snapshot (network-snapshot-*.pkl) or an exported model folder"
        )
    denoiser, config = read_edm_snapshot(path)
    folder = _new_folder(out)
    normalisation, encoder, card = pixel_normalisation(denoiser.channels), None, None
    if autoencoder is not None:
        encoder, card = fetch_autoencoder(autoencoder)
        if card.latent_channels != denoiser.channels:
            raise UserError(
                f"{path} has {denoiser.channels} channels and {autoencoder} {card.latent_channels}: "
                "give the autoencoder that its latents were encoded with"
            )
        mean, scale = (card.shift,) * denoiser.channels, (card.scale,) * denoiser.channels
        normalisation = Normalisation("latents", mean, scale)
    elif denoiser.channels not in PIXEL_CHANNELS:
        raise UserError(
            f"{path} has {denoiser.channels} channels, so it makes latents: give --autoencoder, the diffusers "
            "folder that they were encoded with"
        )
    with whole_folder(folder) as partial:
        if encoder is not None:
            shutil.copytree(encoder, partial / "autoencoder", ignore=_pickles)
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
    say(f"  {path.name}: {config.network}, {denoiser.resolution} pixels, {denoiser.channels} channels -> {folder}")
    return folder


def export_model(model: str, out: str) -> Path:
    """Copy a verified model folder out of the registry, or from anywhere: safetensors and JSON.

    Returns the folder. Raises UserError for an unknown model and for a folder that is not empty, and
    CheckpointError where the weights do not match their checksum.
    """
    fetched = fetch_model(model)
    card = verified_card(fetched.folder)
    folder = _new_folder(out)
    with whole_folder(folder) as partial:
        shutil.copytree(fetched.folder, partial, dirs_exist_ok=True)
    say(f"  {card.name} -> {folder / 'model.safetensors'}; read it with safetensors.torch.load_file")
    return folder


def average_model(run: str, out: str, sigma_rel: float) -> Path:
    """Make the model whose average has the relative width `sigma_rel`, from the averages that a run kept (EDM2).

    Returns its folder. Raises UserError for a run that is not finished or kept none, for a width outside
    0 ... 0.288, and for a folder that is not empty.
    """
    source = local_copy(run, without_tensors)
    if not (source / "model" / "model.json").is_file():
        raise UserError(f"{source} is no finished run: give the --out folder of `patchloom train`")
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
    denoiser.load_state_dict(denoiser.state_dict() | combine((load_file(file) for file in files), shares))
    folder = _new_folder(out)
    with whole_folder(folder) as partial:
        for name in ("recipe.yaml", "autoencoder"):
            _copy(source / "model" / name, partial / name)
        average = AverageCard(sigma_rel=sigma_rel, snapshots=len(files))
        save_model(partial, denoiser, replace(card, average=average))
    say(f"  the average of width {sigma_rel:g}, from {len(files)} kept ones -> {folder}")
    return folder


def _pickles(folder: str, names: list[str]) -> list[str]:
    """What of an autoencoder's folder from elsewhere does not come along."""
    paths = [Path(folder) / name for name in names]
    return [path.name for path in paths if path.is_file() and is_pickle(path)]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.is_file():
        shutil.copy(source, target)


def _new_folder(out: str) -> Path:
    """The path of a folder that does not hold anything yet, whose parent can be written."""
    folder = local_path(out)
    make_folder(folder.parent)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose a new folder")
    return folder
