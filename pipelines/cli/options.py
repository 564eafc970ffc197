"""Options that several commands share, each declared once."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from patchloom.errors import UserError

if TYPE_CHECKING:
    from patchloom.platform.compute.resources import Resources

ModelReference = Annotated[
    str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model, or a model or run folder")
]
RegisteredName = Annotated[str, typer.Argument(help="Name of the registered model")]
VersionNumber = Annotated[int, typer.Argument(min=1, help="Number of the version")]
FolderToWrite = Annotated[str, typer.Argument(help="Folder to write: a path, or an address such as s3://...")]
ModelFolderToWrite = Annotated[str, typer.Argument(help="New folder for the model")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; can be repeated")
]
Backbones = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-backbone",
        metavar="PACKAGE",
        help="Allow networks to be imported from this Python package; can be repeated",
    ),
]
MapWorkers = Annotated[
    int | None,
    typer.Option(
        min=0, help="Parallel worker processes; 0 runs in this process, without Ray  [default: all GPUs, or all CPUs]"
    ),
]
TrainWorkers = Annotated[
    int | None,
    typer.Option(min=0, help="Ray Train workers; 0 trains in this process, without Ray  [default: 1]"),
]
ResourceSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--resources",
        metavar="FILE|KEY=VALUE",
        help="Which nodes the workers use: a YAML file, or cpus_per_worker=4, accelerator=A100, placement=spread, ...; "
        "can be repeated",
    ),
]
Gpus = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="GPUs of each worker; workers that do not train can share one, such as 0.5  "
        "[default: 1 if the cluster has or can start GPUs, otherwise 0]",
    ),
]
Wait = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="MINUTES",
        help="How long to wait for nodes of a cluster  [default: 30 with an autoscaler, otherwise 0]",
    ),
]


def chosen_resources(
    settings: list[str] | None, wait: float | None, workers: int | None, gpus: float | None, for_trials: bool = False
) -> "Resources":
    """The resources that the options name. Sets the addresses of Ray and MLflow, unless they are set.

    Raises:
        UserError: an option is wrong.
    """
    from patchloom.platform.compute.devices import DEVICE_VARIABLE  # here: these imports take longer than --help
    from patchloom.platform.compute.resources import load_resources

    resources = load_resources(settings or [])
    resources.set_environment()
    given = {"workers": workers, "wait_minutes": wait, "gpus_per_worker": gpus}
    resources = resources.with_values(**{name: value for name, value in given.items() if value is not None})
    if gpus is not None and resources.workers == 0 and not for_trials:
        raise UserError(
            f"--gpus {gpus:g} is for workers, and --workers 0 has none: leave --gpus out. This process uses the first "
            f"GPU, or the device in {DEVICE_VARIABLE}"
        )
    return resources


def looks_like_model(reference: str) -> bool:
    """Whether an argument is the reference of a model, or a folder that has one."""
    if reference.startswith(("models:/", "runs:/")):
        return True
    return any((Path(reference) / name).is_file() for name in ("model.json", "model/model.json"))


def exists_here(path: str) -> bool:
    """Whether an argument is a file or folder with something in it that is not a dataset of Patchloom."""
    place = Path(path)
    return place.is_file() or (place.is_dir() and any(place.iterdir()) and not is_prepared(path))


def is_prepared(path: str) -> bool:
    """Whether an argument is a prepared dataset, finished or not."""
    return any((Path(path) / name).is_file() for name in ("dataset.json", ".work/plan.json"))


def check_order(names: str, first: str, second: str, is_first: Callable[[str], bool]) -> None:
    """Raise UserError if two arguments look swapped: the second is what the first should be, and the first is nothing.

    An address as the first one, such as s3://... or models:/..., is never nothing.
    """
    if ":/" not in first and not Path(first).exists() and is_first(second) and not is_first(first):
        raise UserError(f"{first} and {second} look swapped: give them in the order {names}, as {second} {first}")


def required_out(out: str | None, what: str) -> str:
    """The value of --out, which only --dry-run can leave out; raises UserError if it is missing."""
    if not out:
        raise UserError(f"--out is missing: give a folder for the {what}")
    return out
