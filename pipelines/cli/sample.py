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
    MapWorkers,
    ModelReference,
    ResourceSettings,
    Wait,
    check_order,
    chosen_resources,
    looks_like_model,
)
from patchloom.pipelines.cli.output import Printed, printed_plan
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the number of images, the batch and the memory, then exit")
    ] = False,
    allow_backbone: Backbones = None,
    workers: MapWorkers = None,
    gpus: Gpus = None,
    resources: ResourceSettings = None,
    wait: Wait = None,
    **options: Any,
) -> Printed:
    """Sample one image per seed into a folder."""
    given = {declared.name: _parse(declared, options[declared.name]) for declared in fields(SampleOptions)}
    try:
        SampleOptions(**given)  # before the imports, which take seconds
    except ValueError as error:
        raise UserError(str(error)) from None
    check_order("MODEL OUT", model, out, looks_like_model)
    nodes = chosen_resources(resources, wait, workers, gpus)
    from patchloom.pipelines.sample.sampling import describe_sampling
    from patchloom.pipelines.sample.sampling import sample as run

    allow_backbones(*allow_backbone or [])
    if dry_run:
        return printed_plan(describe_sampling(model, out, seeds, workers=nodes.workers, resources=nodes, **given))
    return Printed(asdict(run(model, out, seeds, workers=nodes.workers, resources=nodes, **given)))


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
    choices = list(limits["choices"] or ())
    offered = {"autocompletion": lambda incomplete: [one for one in choices if one.startswith(incomplete)]}
    annotation = Annotated[
        kind, typer.Option(help=text, min=limits["minimum"], metavar=metavar, **(offered if choices else {}))
    ]
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
