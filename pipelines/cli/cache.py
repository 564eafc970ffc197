"""The commands of `patchloom cache`: show and free what nodes keep of remote files."""

from typing import Annotated

import typer

from patchloom.pipelines.cli.help import CommandApp
from patchloom.pipelines.cli.output import Printed

cache_app = CommandApp(help="Show and free what a node keeps of remote files.", epilog="Example: patchloom cache list")

Kind = Annotated[str | None, typer.Option(help="Only this kind: datasets, runs, features, ...  [default: all]")]
OlderThan = Annotated[
    float, typer.Option(min=0, metavar="DAYS", help="Only entries that were not used for so many days")
]
AllNodes = Annotated[bool, typer.Option("--cluster", help="Every node of the cluster at RAY_ADDRESS")]


@cache_app.add("patchloom cache list --kind runs", "list")
def cache_list(kind: Kind = None, older_than: OlderThan = 0, all_nodes: AllNodes = False) -> Printed:
    """List the entries of the cache: size, last use, and what cannot be removed now."""
    from patchloom.pipelines.cache import CacheWish, cache_json, cache_text, list_cache

    found = list_cache(CacheWish(kind or "*", older_than), all_nodes)
    return Printed(cache_json(found), cache_text(found))


@cache_app.add("patchloom cache clear --older-than 30", "clear")
def cache_clear(kind: Kind = None, older_than: OlderThan = 0, all_nodes: AllNodes = False) -> Printed:
    """Remove entries of the cache. What a process uses stays, and so does work that is not sent yet."""
    from patchloom.pipelines.cache import CacheWish, cache_json, clear_cache, cleared_text

    found = clear_cache(CacheWish(kind or "*", older_than), all_nodes)
    return Printed(cache_json(found), cleared_text(found))
