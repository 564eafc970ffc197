"""Promoting: point an alias at a version, optionally only if it is better."""

from patchloom.errors import UserError
from patchloom.pipelines.registry.comparing import why_not_comparable
from patchloom.pipelines.registry.quality import TITLES, comparable, evaluations_of, is_better
from patchloom.platform.tracking.aliases import aliased_version, move_alias
from patchloom.platform.tracking.names import check_alias
from patchloom.platform.tracking.registry import described_version
from patchloom.platform.tracking.versions import RegisteredVersion


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
