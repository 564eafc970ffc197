"""The commands of `patchloom models`: browse the registry, and move models into and out of it."""

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.cli.options import (
    Backbones,
    Json,
    ModelFolderToWrite,
    ModelReference,
    RegisteredName,
    VersionNumber,
    messages_to_stderr,
    print_json,
)
from patchloom.platform.files.folder import is_remote

MovedAlias = Annotated[str, typer.Option(help="The alias")]

models_app = typer.Typer(help="Browse, register, compare, promote and convert models.", rich_markup_mode=None)


@models_app.command(
    "list",
    epilog="Example: patchloom models list my-model --where 'fid < 12' --where 'recipe.patches.p = 0.5' --sort fid",
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
    as_json: Json = False,
) -> None:
    """List versions of registered models.

    MLflow's server filters, sorts and pages. A metric has the name that MLflow shows. `fid` is the evaluation with the
    most samples; `quality/fid n-50000 heun-18` is one way to measure.
    """
    from patchloom.pipelines.registry.listing import empty_list, models_table
    from patchloom.platform.tracking.versions import search_versions

    found = search_versions(name, where or [], sort, limit, page)
    if as_json:
        print_json([asdict(version) for version in found.versions])
    elif found.versions:
        print(models_table(found.versions))
    else:
        print(empty_list(bool(name or where or sort)))
    if found.next_page:
        print(f"more: pass --page {found.next_page}, or a larger --limit", file=sys.stderr if as_json else sys.stdout)


@models_app.command("show", epilog="Example: patchloom models show models:/my-model@champion")
def models_show(
    model: ModelReference,
    picture: Annotated[str | None, typer.Option(metavar="PNG", help="Save the preview grid of the run here")] = None,
    as_json: Json = False,
) -> None:
    """Verify a model and print its card.

    The card has its origin, its metrics, and the command that samples from it.
    """
    from patchloom.pipelines.registry.describing import describe_model, show_model

    if as_json:
        print(describe_model(model).to_json())
    else:
        print(show_model(model, picture))


@models_app.command("compare", epilog="Example: patchloom models compare models:/my-model@champion models:/my-model/4")
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
    as_json: Json = False,
) -> None:
    """Compare recipes, metrics and samples of two models."""
    from patchloom.pipelines.registry.comparing import compare_models

    with messages_to_stderr(as_json):
        found = compare_models(one, other, picture=None if no_picture else picture, seeds=seeds, steps=steps)
    if as_json:
        print(found.to_json())
    else:
        print(found.text())


@models_app.command("register", epilog="Example: patchloom models register run my-model --alias champion")
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
) -> None:
    """Register the model of a run as a new version."""
    from patchloom.pipelines.registry.registering import register

    register(run, name, alias, by_reference=by_reference)


@models_app.command("import", epilog="Example: patchloom models import network-snapshot-200000.pkl ffhq")
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
) -> None:
    """Turn an EDM snapshot into a model folder."""
    from patchloom.pipelines.registry.convert import import_model

    path = import_model(snapshot, out, autoencoder)
    _print_sample_command(out if is_remote(out) else path)


@models_app.command("export", epilog="Example: patchloom models export models:/my-model@champion my-model")
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
) -> None:
    """Copy a model out of the registry, as safetensors and JSON, with a model card.

    The card, README.md, has the format of the Hugging Face Hub, so that the folder can be uploaded as it is.
    """
    from patchloom.pipelines.registry.convert import export_model

    export_model(model, out, diffusers=diffusers, license_id=license_id)


@models_app.command("average", epilog="Example: patchloom models average run wider --sigma-rel 0.15")
def models_average(
    run: Annotated[str, typer.Argument(help="Folder of a finished run that kept power-function averages")],
    out: ModelFolderToWrite,
    sigma_rel: Annotated[float, typer.Option(help="Relative width of the average, between 0 and 0.288")],
    allow_backbone: Backbones = None,
) -> None:
    """Make a model with another EMA length after the run (EDM2)."""
    from patchloom.pipelines.registry.convert import average_model

    allow_backbones(*allow_backbone or [])
    path = average_model(run, out, sigma_rel)
    _print_sample_command(out if is_remote(out) else path)


@models_app.command("promote", epilog="Example: patchloom models promote my-model 3 --alias champion --if-better fid")
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
    as_json: Json = False,
) -> None:
    """Point an alias at a version."""
    from patchloom.pipelines.registry.promoting import promote_model

    message = promote_model(name, str(version), alias, if_better)
    if as_json:
        print_json({"name": name, "version": str(version), "alias": alias, "words": message})
    else:
        print(message)


@models_app.command("history", epilog="Example: patchloom models history my-model --alias champion")
def models_history(name: RegisteredName, alias: MovedAlias = "champion", as_json: Json = False) -> None:
    """Show which versions an alias pointed at, and why it was moved."""
    from patchloom.pipelines.registry.history import alias_history

    history = alias_history(name, alias)
    if as_json:
        print_json(asdict(history) | {"moves": [move.to_dict() for move in history.moves]})
    else:
        print(history.text())


@models_app.command("rollback", epilog="Example: patchloom models rollback my-model --alias champion")
def models_rollback(name: RegisteredName, alias: MovedAlias = "champion") -> None:
    """Move an alias back to the version before; a second call goes one version further back."""
    from patchloom.pipelines.registry.history import rollback_alias

    print(rollback_alias(name, alias))


@models_app.command("delete", epilog="Example: patchloom models delete my-model 3")
def models_delete(
    name: RegisteredName,
    version: VersionNumber,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation")] = False,
) -> None:
    """Delete a version from the registry; its run is kept."""
    from patchloom.pipelines.registry.deleting import delete_model

    print(delete_model(name, str(version), yes))


@models_app.command("prune", epilog="Example: patchloom models prune my-model --keep 10 --dry-run")
def models_prune(
    name: RegisteredName,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest versions to keep")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be deleted")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation")] = False,
) -> None:
    """Delete old versions from the registry; keep the newest, those with an alias, and those that a rollback needs.

    MLflow keeps their runs and files: `mlflow.delete_logged_model(ID)` and then `mlflow gc` remove the files.
    """
    from patchloom.pipelines.registry.deleting import prune_model

    print(prune_model(name, keep, dry_run=dry_run, yes=yes).text())


@models_app.command("relocate", epilog="Example: patchloom models relocate")
def models_relocate() -> None:
    """Correct the artifact addresses of an mlflow.db that was copied or moved with its folder."""
    from patchloom.platform.tracking.store import relocate

    print(relocate())


def _print_sample_command(folder: object) -> None:
    print(f"sample from it: patchloom sample {folder} samples --seeds 0-63")
