"""The command `patchloom sample`. Its options are the fields of `SampleOptions`."""

import inspect
from collections.abc import Callable
from dataclasses import Field, asdict, fields
from typing import Annotated, Any

import typer

from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.cli.options import (
    Backbones,
    FolderToWrite,
    Gpus,
    Json,
    MapWorkers,
    ModelReference,
    ResourceSettings,
    Wait,
    chosen_resources,
    messages_to_stderr,
    print_json,
)
from patchloom.pipelines.sample.options import SampleOptions, parse_levels, parse_size

# how a pair of numbers is written on the command line
PAIR_PARSERS: dict[Any, tuple[str, Callable[[str, str], Any]]] = {
    tuple[int, int] | None: ("HxW", parse_size),
    tuple[float, float] | None: ("LOW-HIGH", parse_levels),
}


def sample(
    model: ModelReference,
    out: FolderToWrite,
    seeds: Annotated[str, typer.Option(help="Seeds: 0-63, or 0,5,9, or a file with one seed per line")] = "0-63",
    as_json: Json = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the number of images, the batch and the memory, then exit")
    ] = False,
    allow_backbone: Backbones = None,
    workers: MapWorkers = None,
    gpus: Gpus = None,
    resources: ResourceSettings = None,
    wait: Wait = None,
    **options: Any,
) -> None:
    """Sample one image per seed into a folder."""
    given = {declared.name: _parse(declared, options[declared.name]) for declared in fields(SampleOptions)}
    try:
        SampleOptions(**given)  # before the imports, which take seconds
    except ValueError as error:
        raise UserError(str(error)) from None
    nodes = chosen_resources(resources, wait, workers, gpus)
    from patchloom.pipelines.sample.sampling import sample as run
    from patchloom.pipelines.sample.sampling import sample_plan

    allow_backbones(*allow_backbone or [])
    if dry_run:
        print(sample_plan(model, out, seeds, workers=nodes.workers, resources=nodes, **given))
        return
    with messages_to_stderr(as_json):
        result = run(model, out, seeds, workers=nodes.workers, resources=nodes, **given)
    if as_json:
        print_json(asdict(result))


def _parse(declared: "Field[Any]", value: Any) -> Any:
    if declared.type not in PAIR_PARSERS or not value:
        return value
    return PAIR_PARSERS[declared.type][1](value, f"--{declared.name.replace('_', '-')}")


def _parameter(declared: "Field[Any]") -> inspect.Parameter:
    """An option of the command line made from a field."""
    limits, text = declared.metadata, declared.metadata["help"]
    if limits["choices"]:
        text += f"; one of {', '.join(limits['choices'])}"
    kind: Any = str | None if declared.type in PAIR_PARSERS else declared.type
    metavar = PAIR_PARSERS[declared.type][0] if declared.type in PAIR_PARSERS else None
    annotation = Annotated[kind, typer.Option(help=text, min=limits["minimum"], metavar=metavar)]
    return inspect.Parameter(
        declared.name, inspect.Parameter.KEYWORD_ONLY, default=declared.default, annotation=annotation
    )


def _signature() -> inspect.Signature:
    """The signature of `sample` with the fields of `SampleOptions` after the seeds, in the place of `**options`."""
    model, out, seeds, *others, _ = inspect.signature(sample).parameters.values()
    return inspect.Signature([
        model, out, seeds, *map(_parameter, fields(SampleOptions)),
        *(other.replace(kind=inspect.Parameter.KEYWORD_ONLY) for other in others),
    ])  # fmt: skip


sample.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads the parameters from it
