"""Promoting: point an alias at a version, optionally only if it is better; and delete versions."""

import sys

from patchloom.errors import UserError
from patchloom.pipelines.registry.comparing import why_not_comparable
from patchloom.pipelines.registry.quality import TITLES, comparable, evaluations_of, is_better
from patchloom.platform.progress import say
from patchloom.platform.tracking.aliases import aliased_version, move_alias, record_move
from patchloom.platform.tracking.names import check_alias
from patchloom.platform.tracking.registry import delete_version, described_version
from patchloom.platform.tracking.versions import RegisteredVersion, list_versions


def promote_model(name: str, version: str, alias: str = "champion", if_better: str | None = None) -> str:
    """Point an alias at a version.

    Args:
        name: the registered model.
        version: its number, such as "3".
        alias: the alias to move.
        if_better: promote only if the version is better in this metric (`fid`, `kid`, ...) than the version that
            the alias points at, measured in the same way.

    Returns:
        What was done, in words.

    Raises:
        UserError: there is no such version, or MLflow does not accept the alias; or the version is not better, or
            the two cannot be compared. The alias then stays where it was.

    Example:
        patchloom.promote_model("my-model", "1", alias="candidate")
    """
    check_alias(alias)
    new = described_version(name, version)
    current = aliased_version(name, alias)
    message = f"models:/{name}@{alias} is version {version}"
    if current == version:
        return f"{message} already"
    reason = ""
    if if_better is not None and current is not None:
        reason = _improvement(new, described_version(name, current), if_better)
    move_alias(name, alias, version, "promote", reason)
    return f"{message} ({reason})" if reason else message


def _improvement(new: RegisteredVersion, old: RegisteredVersion, metric: str) -> str:
    """Both values of the metric as text; raises UserError if the new version is not better or cannot be compared."""
    is_better(metric, 0.0, 0.0)  # refuses an unknown metric first
    first, second = evaluations_of(new.tags), evaluations_of(old.tags)
    pairs = comparable(first, second, metric)
    if not pairs:
        with_metric = ([found for found in side if metric in found.metrics] for side in (first, second))
        raise UserError(
            f"versions {new.version} and {old.version} of {new.name} cannot be compared by {metric}: "
            f"{'; '.join(why_not_comparable(*with_metric))}"
        )
    new_value, old_value = (found.value(metric) for found in pairs[0])
    values = f"{TITLES[metric][0]} {new_value:.6g} compared with {old_value:.6g}"
    if not is_better(metric, new_value, old_value):
        raise UserError(f"version {new.version} is not better than version {old.version}: {values}; not promoted")
    return values


def delete_model(name: str, version: str, yes: bool = False) -> str:
    """Delete a version from the registry. Its run and its samples are kept.

    Args:
        name: the registered model.
        version: its number, such as "3".
        yes: delete without asking; otherwise the terminal asks for confirmation.

    Returns:
        What was done, in words.

    Raises:
        UserError: there is no such version, or `yes` is False and there is no terminal.

    Example:
        patchloom.delete_model("my-model", "1", yes=True)
    """
    aliases = described_version(name, version).aliases
    what = f"models:/{name}/{version}"
    if aliases:
        what += f" ({', '.join(f'@{alias}' for alias in aliases)})"
    if not yes:
        if not sys.stdin.isatty():
            raise UserError(f"{what} was not deleted: there is no terminal to ask for confirmation; pass --yes")
        say(f"Delete {what}? [y/N] ")
        if input().strip().lower() not in ("y", "yes"):
            return "nothing was deleted"
    delete_version(name, version)
    for alias in aliases if list_versions(name, limit=1) else ():
        record_move(name, alias, None, version, "delete")
    return f"deleted models:/{name}/{version}"
