"""The commands of `patchloom cache`: show and free what nodes keep of remote files."""

from typing import Annotated

import typer

from patchloom.pipelines.cli.options import Json, messages_to_stderr, print_json

cache_app = typer.Typer(help="Show and free what a node keeps of remote files.", rich_markup_mode=None)

Kind = Annotated[str | None, typer.Option(help="Only this kind: datasets, runs, features, ...  [default: all]")]
OlderThan = Annotated[
    float, typer.Option(min=0, metavar="DAYS", help="Only entries that were not used for so many days")
]
AllNodes = Annotated[bool, typer.Option("--cluster", help="Every node of the cluster at RAY_ADDRESS")]


@cache_app.command("list", epilog="Example: patchloom cache list --kind runs")
def cache_list(
    kind: Kind = None, older_than: OlderThan = 0, all_nodes: AllNodes = False, as_json: Json = False
) -> None:
    """List the entries of the cache: size, last use, and what cannot be removed now."""
    from patchloom.pipelines.cache import CacheWish, cache_json, list_cache, show_cache

    with messages_to_stderr(as_json):
        found = list_cache(CacheWish(kind or "*", older_than), all_nodes)
    if as_json:
        print_json(cache_json(found))
    else:
        show_cache(found)


@cache_app.command("clear", epilog="Example: patchloom cache clear --older-than 30")
def cache_clear(
    kind: Kind = None, older_than: OlderThan = 0, all_nodes: AllNodes = False, as_json: Json = False
) -> None:
    """Remove entries of the cache. What a process uses stays, and so does work that is not sent yet."""
    from patchloom.pipelines.cache import CacheWish, cache_json, clear_cache, show_cleared

    with messages_to_stderr(as_json):
        found = clear_cache(CacheWish(kind or "*", older_than), all_nodes)
    if as_json:
        print_json(cache_json(found))
    else:
        show_cleared(found)
