"""The commands of `patchloom models`: browse the registry, bring models in and out of it, promote them."""

import contextlib
import json
import sys
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer

from patchloom.models.backbones import allow_backbones

models_app = typer.Typer(help="Browse and promote registered models.", rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout, for programs")]
Model = Annotated[str, typer.Argument(help="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/... or a folder")]
Backbones = Annotated[
    list[str] | None,
    typer.Option("--allow-backbone", metavar="PACKAGE", help="A package that networks may be imported from"),
]


def aside(as_json: bool) -> AbstractContextManager[Any]:
    """While this holds, what is said goes to stderr where stdout is to be JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


@models_app.command("list")
def models_list(as_json: Json = False) -> None:
    """Every version of every registered model."""
    from patchloom.pipelines.registry.browse import models_table
    from patchloom.platform.tracking.registry import list_versions

    print(json.dumps(list_versions()) if as_json else models_table())


@models_app.command("show", epilog="Example: patchloom models show models:/patchloom-demo@champion")
def models_show(
    model: Model,
    picture: Annotated[str | None, typer.Option(metavar="PNG", help="Keep its preview grid in this file")] = None,
    as_json: Json = False,
) -> None:
    """One model, verified: its card, lineage, metrics, and how to sample from it."""
    from patchloom.pipelines.registry.browse import model_card, show_model

    print(json.dumps(model_card(model)) if as_json else show_model(model, picture))


@models_app.command("compare", epilog="Example: patchloom models compare models:/my-model@champion models:/my-model/4")
def models_compare(
    one: Model,
    other: Model,
    picture: Annotated[str, typer.Option(metavar="PNG", help="Where the samples of both go")] = "comparison.png",
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Sample nothing")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, 0 and on")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Noise levels")] = 18,
    as_json: Json = False,
) -> None:
    """Two models: what differs in their recipes, their metrics, and samples of the same seeds."""
    from patchloom.pipelines.registry.browse import compare_models, comparison_words

    with aside(as_json):
        found = compare_models(one, other, picture=None if no_picture else picture, seeds=seeds, steps=steps)
    print(json.dumps(found) if as_json else comparison_words(found))


@models_app.command("register", epilog="Example: patchloom models register run my-model --alias champion")
def models_register(
    run: Annotated[str, typer.Argument(help="The folder of a finished run, or of a model")],
    name: Annotated[str, typer.Argument(help="Name in the registry")],
    alias: Annotated[str | None, typer.Option(help="Point this alias at the version: champion, candidate")] = None,
) -> None:
    """Make the model of a run, or an imported one, a version of a registered name."""
    from patchloom.pipelines.registry.registering import register

    register(run, name, alias)


@models_app.command("import", epilog="Example: patchloom models import network-snapshot-200000.pkl ffhq")
def models_import(
    snapshot: Annotated[
        str,
        typer.Argument(help="A snapshot of EDM or Patch Diffusion (.pkl, nothing in it is run), or an exported folder"),
    ],
    out: Annotated[str, typer.Argument(help="The model folder to write")],
    autoencoder: Annotated[
        str | None, typer.Option(help="For latents: the diffusers folder, or models:/..., that they belong to")
    ] = None,
) -> None:
    """Turn an EDM snapshot into a model folder."""
    from patchloom.pipelines.registry.convert import import_model

    folder = import_model(snapshot, out, autoencoder)
    print(f"sample from it: patchloom sample {folder} samples --seeds 0-63")


@models_app.command("export", epilog="Example: patchloom models export models:/my-model@champion my-model")
def models_export(
    model: Model,
    out: Annotated[str, typer.Argument(help="The folder to write")],
) -> None:
    """Copy a model out of the registry: safetensors and JSON."""
    from patchloom.pipelines.registry.convert import export_model

    export_model(model, out)


@models_app.command("average", epilog="Example: patchloom models average run wider --sigma-rel 0.15")
def models_average(
    run: Annotated[str, typer.Argument(help="A finished run that kept power-function averages")],
    out: Annotated[str, typer.Argument(help="The model folder to write")],
    sigma_rel: Annotated[float, typer.Option(help="Width of the average relative to the run, 0 to 0.288")],
    allow_backbone: Backbones = None,
) -> None:
    """Make a model of any length of average after the run (EDM2)."""
    from patchloom.pipelines.registry.convert import average_model

    allow_backbones(*allow_backbone or [])
    folder = average_model(run, out, sigma_rel)
    print(f"sample from it: patchloom sample {folder} samples --seeds 0-63")


@models_app.command("promote", epilog="Example: patchloom models promote my-model 3 --alias champion --if-better fid")
def models_promote(
    name: Annotated[str, typer.Argument(help="Name in the registry")],
    version: Annotated[int, typer.Argument(help="Number of the version")],
    alias: Annotated[str, typer.Option(help="The alias to point at it")] = "champion",
    if_better: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Only where it beats the alias's version: fid, kid, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version."""
    from patchloom.pipelines.registry.browse import promote_model

    words = promote_model(name, str(version), alias, if_better)
    print(json.dumps({"name": name, "version": str(version), "alias": alias, "words": words}) if as_json else words)


@models_app.command("delete", epilog="Example: patchloom models delete my-model 3")
def models_delete(
    name: Annotated[str, typer.Argument(help="Name in the registry")],
    version: Annotated[int, typer.Argument(help="Number of the version")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """Delete a version from the registry, after a question; its run stays."""
    from patchloom.pipelines.registry.browse import delete_model

    print(delete_model(name, str(version), yes))
