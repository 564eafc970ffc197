"""Patchloom: image diffusion models trained on patches, on Ray, kept in MLflow.

Each step of the flow is one function. It writes a folder, and the next step reads that folder:

    import patchloom

    patchloom.prepare("photos", "dataset", resolution=64)
    recipe = patchloom.load_recipe("demo_pixels", ["patches.p=0.25"])
    patchloom.train(recipe, "dataset", "run", workers=2)
    patchloom.register("run", "my-model", alias="champion")
    patchloom.sample("models:/my-model@champion", "samples", seeds="0-63")
    patchloom.evaluate("samples", "dataset")

Steps
    prepare            images -> a dataset of pixels or latents
    train_autoencoder  a pixel dataset -> an autoencoder, for latents
    train              a recipe and a dataset -> a run folder with a model
    tune               a search and a dataset -> ranked trials
    register           a run -> a version of a registered model
    sample             a model and seeds -> a folder of images
    evaluate           samples and a reference -> FID, KID, ...
    report             a run, search or sample folder -> an HTML page
    inspect            a dataset or model -> its verified card

Datasets, recipes and models
    open               open_dataset, load_recipe, load_model, load_trials
    convert            import_model, export_model, average_model
    registry           list_versions, describe_model, compare_models,
                       promote_model, delete_model, prune_model,
                       alias_history, rollback_alias
    types              Dataset, Recipe, Denoiser, AutoencoderSettings

Sampling in your own code
    Sampler            seeds and labels -> images, for map_batches of Ray Data
    samplers           heun, euler, ddim, ancestral, dpmpp_2m, dpmpp_2m_sde, plms
    noise ladders      karras_sigmas, linear_sigmas, ve_sigmas, vp_sigmas, iddpm_sigmas
    start noise        SeededNoise

Metrics
    of features        frechet_distance, kernel_distance
    of class logits    inception_score

Errors
    Error              the base class
    UserError          a mistake that you can fix; the message says how
    CheckpointError    a UserError: a model or checkpoint cannot be read
    Stopped            the job was asked to stop; it can continue later

`import patchloom` is fast. torch, Ray, MLflow and pydantic are imported when
you first use a name that needs them.
"""

from typing import TYPE_CHECKING

from patchloom.errors import CheckpointError, Error, Stopped, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from patchloom.models.denoiser import Denoiser as Denoiser
    from patchloom.models.metrics import frechet_distance, inception_score, kernel_distance
    from patchloom.models.noise import iddpm_sigmas, karras_sigmas, linear_sigmas, ve_sigmas, vp_sigmas
    from patchloom.models.samplers import (
        SeededNoise,
        ancestral,
        ddim,
        dpmpp_2m,
        dpmpp_2m_sde,
        euler,
        heun,
        plms,
    )
    from patchloom.pipelines.evaluate import evaluate
    from patchloom.pipelines.inspect import inspect
    from patchloom.pipelines.prepare import prepare
    from patchloom.pipelines.registry.comparing import compare_models
    from patchloom.pipelines.registry.convert import average_model, export_model, import_model
    from patchloom.pipelines.registry.deleting import delete_model, prune_model
    from patchloom.pipelines.registry.describing import describe_model
    from patchloom.pipelines.registry.history import alias_history, rollback_alias
    from patchloom.pipelines.registry.promoting import promote_model
    from patchloom.pipelines.registry.registering import register
    from patchloom.pipelines.report import report
    from patchloom.pipelines.sample import sample
    from patchloom.pipelines.sample.sampler import Sampler
    from patchloom.pipelines.train import train
    from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder
    from patchloom.pipelines.tune import tune
    from patchloom.pipelines.tune.frame import load_trials
    from patchloom.platform.dataset import Dataset, open_dataset
    from patchloom.platform.recipe import Recipe as Recipe
    from patchloom.platform.recipe import load_recipe
    from patchloom.platform.tracking.versions import list_versions

__version__ = "0.1.0"

# Denoiser and Recipe are left out: help(patchloom) would list the hundreds of methods that they inherit.
__all__ = [
    "AutoencoderSettings",
    "CheckpointError",
    "Dataset",
    "Error",
    "Sampler",
    "SeededNoise",
    "Stopped",
    "UserError",
    "alias_history",
    "ancestral",
    "average_model",
    "compare_models",
    "ddim",
    "delete_model",
    "describe_model",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "euler",
    "evaluate",
    "export_model",
    "frechet_distance",
    "heun",
    "iddpm_sigmas",
    "import_model",
    "inception_score",
    "inspect",
    "karras_sigmas",
    "kernel_distance",
    "linear_sigmas",
    "list_versions",
    "load_model",
    "load_recipe",
    "load_trials",
    "open_dataset",
    "plms",
    "prepare",
    "promote_model",
    "prune_model",
    "register",
    "report",
    "rollback_alias",
    "sample",
    "train",
    "train_autoencoder",
    "tune",
    "ve_sigmas",
    "vp_sigmas",
]

# The module of each name that is imported on first use.
_MODULES = {
    "models.denoiser": ("Denoiser",),
    "models.metrics": ("frechet_distance", "inception_score", "kernel_distance"),
    "models.noise": ("iddpm_sigmas", "karras_sigmas", "linear_sigmas", "ve_sigmas", "vp_sigmas"),
    "models.samplers": ("SeededNoise", "ancestral", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun", "plms"),
    "pipelines.evaluate": ("evaluate",),
    "pipelines.inspect": ("inspect",),
    "pipelines.prepare": ("prepare",),
    "pipelines.registry.comparing": ("compare_models",),
    "pipelines.registry.convert": ("average_model", "export_model", "import_model"),
    "pipelines.registry.describing": ("describe_model",),
    "pipelines.registry.history": ("alias_history", "rollback_alias"),
    "pipelines.registry.deleting": ("delete_model", "prune_model"),
    "pipelines.registry.promoting": ("promote_model",),
    "pipelines.registry.registering": ("register",),
    "pipelines.report": ("report",),
    "pipelines.sample": ("sample",),
    "pipelines.sample.sampler": ("Sampler",),
    "pipelines.train": ("train",),
    "pipelines.train.autoencoder": ("AutoencoderSettings", "train_autoencoder"),
    "pipelines.tune": ("tune",),
    "pipelines.tune.frame": ("load_trials",),
    "platform.dataset": ("Dataset", "open_dataset"),
    "platform.recipe": ("Recipe", "load_recipe"),
    "platform.tracking.versions": ("list_versions",),
}


def load_model(reference: "str | Path") -> "Denoiser":
    """Load the denoiser of a model.

    Args:
        reference: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/ID/model`, or a model or run folder.
            A folder may be remote.

    Returns:
        The network with its averaged weights, on the CPU, in eval mode and without gradients.

    Raises:
        UserError: there is no such model.
        CheckpointError: the folder is damaged, a newer version of Patchloom wrote it, or its network comes from
            a package that is not allowed.

    Example:
        import torch

        denoiser = patchloom.load_model("models:/my-model@champion")
        shape = (denoiser.channels, denoiser.resolution, denoiser.resolution)
        sigmas = patchloom.karras_sigmas(steps=18)
        start = patchloom.SeededNoise(seeds=[0, 1], shape=shape)() * sigmas[0]
        images = patchloom.heun(denoiser, start, sigmas)
    """
    from pathlib import Path

    from patchloom.models.checkpoints import load_model as load_denoiser

    if (Path(reference) / "model.json").is_file():
        return load_denoiser(reference)  # needs torch and safetensors only
    from patchloom.platform.tracking.registry import fetch_model

    return load_denoiser(fetch_model(str(reference)).folder)


def __getattr__(name: str) -> object:
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(f"patchloom.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'patchloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
