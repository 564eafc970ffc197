"""The commands of `patchloom models`: browse the registry, and move models into and out of it."""

from dataclasses import asdict
from typing import Annotated

import typer

from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.cli.help import CommandApp
from patchloom.pipelines.cli.options import (
    Backbones,
    ModelFolderToWrite,
    ModelReference,
    RegisteredName,
    VersionNumber,
    check_order,
    exists_here,
    looks_like_model,
)
from patchloom.pipelines.cli.output import Printed
from patchloom.platform.files.folder import is_remote
from patchloom.platform.progress import say

MovedAlias = Annotated[str, typer.Option(help="The alias")]

models_app = CommandApp(
    help="Browse, register, compare, promote and convert models.",
    epilog="Example: patchloom models list my-model --sort fid",
)
BROWSE, FILL, ALIASES, CLEAN = "Browse", "Fill", "Aliases", "Clean up"


@models_app.add(
    "patchloom models list my-model --where 'fid < 12' --where 'recipe.patches.p = 0.5' --sort fid", "list", job=BROWSE
)
def models_list(
    name: Annotated[str | None, typer.Argument(help="Only versions of this model")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="'KEY SIGN VALUE'",
            help="Only versions with this metric, such as 'fid < 12', parameter ('recipe.patches.p = 0.5') or tag "
            "(\"tags.kind = 'latents'\"); LIKE finds parts of texts; can be repeated",
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="name, version, created, updated, or a metric, parameter or tag as for --where; 'KEY desc' reverses "
            "[default: by name, newest first]",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many versions at most")] = 100,
    page: Annotated[str | None, typer.Option(metavar="TOKEN", help="Go on after the page that printed TOKEN")] = None,
) -> Printed:
    """List versions of registered models.

    MLflow's server filters, sorts and pages. A metric has the name that MLflow shows. `fid` is the evaluation with the
    most samples; `quality/fid n-50000 heun-18` is one way to measure.
    """
    from patchloom.pipelines.registry.listing import empty_list, models_table
    from patchloom.platform.tracking.versions import search_versions

    found = search_versions(name, where or [], sort, limit, page)
    table = models_table(found.versions) if found.versions else empty_list(bool(name or where or sort))
    more = f"more: pass --page {found.next_page}, or a larger --limit" if found.next_page else ""
    if more:
        say(more)
    return Printed([asdict(version) for version in found.versions], table)


@models_app.add("patchloom models show models:/my-model@champion", "show", job=BROWSE)
def models_show(
    model: ModelReference,
    picture: Annotated[str | None, typer.Option(metavar="PNG", help="Save the preview grid of the run here")] = None,
) -> Printed:
    """Verify a model and print its card.

    The card has its origin, its metrics, and the command that samples from it.
    """
    from patchloom.pipelines.registry.describing import describe_model, show_model

    return Printed(lambda: describe_model(model).to_json(), lambda: show_model(model, picture))


@models_app.add("patchloom models compare models:/my-model@champion models:/my-model/4", "compare", job=BROWSE)
def models_compare(
    one: ModelReference,
    other: ModelReference,
    picture: Annotated[
        str, typer.Option(metavar="PNG", help="Picture to write: samples of the same seeds, one model per row")
    ] = "comparison.png",
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Do not sample; compare recipes and metrics")] = (
        False
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Images per model, of seeds 0, 1, ...")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps")] = 18,
) -> Printed:
    """Compare recipes, metrics and samples of two models."""
    from patchloom.pipelines.registry.comparing import compare_models

    found = compare_models(one, other, picture=None if no_picture else picture, seeds=seeds, steps=steps)
    return Printed(found.to_json(), found.text())


@models_app.add("patchloom models register run my-model --alias champion", "register", job=FILL)
def models_register(
    run: Annotated[str, typer.Argument(help="Folder of a finished run or of a model")],
    name: RegisteredName,
    alias: Annotated[
        str | None, typer.Option(help="Alias to point at the new version, such as champion or candidate")
    ] = None,
    by_reference: Annotated[
        bool,
        typer.Option(
            "--by-reference",
            help="Upload no copy: record the s3://... address and the sha256 of every file, which must stay there",
        ),
    ] = False,
) -> Printed:
    """Register the model of a run as a new version."""
    check_order("RUN NAME", run, name, exists_here)
    from patchloom.pipelines.registry.registering import register

    reference = register(run, name, alias, by_reference=by_reference)
    return Printed({"model": reference, "alias": alias})


@models_app.add("patchloom models import network-snapshot-200000.pkl ffhq", "import", job=FILL)
def models_import(
    snapshot: Annotated[
        str,
        typer.Argument(
            help="Snapshot of EDM or Patch Diffusion (.pkl; no code in it is run), or a folder of `models export`"
        ),
    ],
    out: ModelFolderToWrite,
    autoencoder: Annotated[
        str | None,
        typer.Option(help="For a model of latents: its autoencoder, a diffusers folder or models:/NAME/VERSION"),
    ] = None,
) -> Printed:
    """Turn an EDM snapshot into a model folder."""
    check_order("SNAPSHOT OUT", snapshot, out, exists_here)
    from patchloom.pipelines.registry.convert import import_model

    path = import_model(snapshot, out, autoencoder)
    return _new_model(out if is_remote(out) else path)


@models_app.add("patchloom models export models:/my-model@champion my-model", "export", job=FILL)
def models_export(
    model: ModelReference,
    out: ModelFolderToWrite,
    diffusers: Annotated[
        bool, typer.Option("--diffusers", help="Write the ControlNet of the model as a folder for diffusers")
    ] = False,
    license_id: Annotated[
        str,
        typer.Option("--license", metavar="ID", help="License of the weights for the model card, such as cc-by-4.0"),
    ] = "unknown",
) -> Printed:
    """Copy a model out of the registry, as safetensors and JSON, with a model card.

    The card, README.md, has the format of the Hugging Face Hub, so that the folder can be uploaded as it is.
    """
    check_order("MODEL OUT", model, out, looks_like_model)
    from patchloom.pipelines.registry.convert import export_model

    return Printed({"folder": str(export_model(model, out, diffusers=diffusers, license_id=license_id))})


@models_app.add("patchloom models average run wider --sigma-rel 0.15", "average", job=FILL)
def models_average(
    run: Annotated[str, typer.Argument(help="Folder of a finished run that kept power-function averages")],
    out: ModelFolderToWrite,
    sigma_rel: Annotated[float, typer.Option(help="Relative width of the average, between 0 and 0.288")],
    allow_backbone: Backbones = None,
) -> Printed:
    """Make a model with another EMA length after the run (EDM2)."""
    check_order("RUN OUT", run, out, exists_here)
    from patchloom.pipelines.registry.convert import average_model

    allow_backbones(*allow_backbone or [])
    path = average_model(run, out, sigma_rel)
    return _new_model(out if is_remote(out) else path)


@models_app.add("patchloom models promote my-model 3 --alias champion --if-better fid", "promote", job=ALIASES)
def models_promote(
    name: RegisteredName,
    version: VersionNumber,
    alias: Annotated[str, typer.Option(help="Alias to point at the version")] = "champion",
    if_better: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Promote only if the version is better in this metric (fid, kid, ...) than the alias's current one",
        ),
    ] = None,
) -> Printed:
    """Point an alias at a version."""
    from patchloom.pipelines.registry.promoting import promote_model

    message = promote_model(name, str(version), alias, if_better)
    return Printed({"name": name, "version": str(version), "alias": alias, "words": message}, message)


@models_app.add("patchloom models history my-model --alias champion", "history", job=ALIASES)
def models_history(name: RegisteredName, alias: MovedAlias = "champion") -> Printed:
    """Show which versions an alias pointed at, and why it was moved."""
    from patchloom.pipelines.registry.history import alias_history

    history = alias_history(name, alias)
    return Printed(asdict(history) | {"moves": [move.to_dict() for move in history.moves]}, history.text())


@models_app.add("patchloom models rollback my-model --alias champion", "rollback", job=ALIASES)
def models_rollback(name: RegisteredName, alias: MovedAlias = "champion") -> Printed:
    """Move an alias back to the version before; a second call goes one version further back."""
    from patchloom.pipelines.registry.history import rollback_alias

    message = rollback_alias(name, alias)
    return Printed({"name": name, "alias": alias, "words": message}, message)


@models_app.add("patchloom models delete my-model 3", "delete", job=CLEAN)
def models_delete(
    name: RegisteredName,
    version: VersionNumber,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation")] = False,
) -> Printed:
    """Delete a version from the registry; its run is kept."""
    from patchloom.pipelines.registry.deleting import delete_model

    message = delete_model(name, str(version), yes)
    return Printed({"name": name, "version": str(version), "words": message}, message)


@models_app.add("patchloom models prune my-model --keep 10 --dry-run", "prune", job=CLEAN)
def models_prune(
    name: RegisteredName,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions to keep")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation")] = False,
) -> Printed:
    """Delete old versions from the registry; keep the newest, those with an alias, and those that a rollback needs.

    MLflow keeps their runs and files: `mlflow.delete_logged_model(ID)` and then `mlflow gc` remove the files.
    """
    from patchloom.pipelines.registry.deleting import prune_model

    found = prune_model(name, keep, dry_run=dry_run, yes=yes)
    return Printed(asdict(found), found.text())


@models_app.add("patchloom models relocate", "relocate", job=CLEAN)
def models_relocate() -> Printed:
    """Correct the artifact addresses of an mlflow.db that was copied or moved with its folder."""
    from patchloom.platform.tracking.store import relocate

    message = relocate()
    return Printed({"words": message}, message)


def _new_model(folder: object) -> Printed:
    command = f"patchloom sample {folder} samples --seeds 0-63"
    return Printed({"model": str(folder), "sample": command}, f"sample from it: {command}")
