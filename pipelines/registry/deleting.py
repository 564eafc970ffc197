"""Deleting: one version, or all old versions that no alias and no rollback needs."""

import sys
from dataclasses import dataclass

from patchloom.errors import UserError
from patchloom.platform.progress import say
from patchloom.platform.tracking.aliases import alias_moves, alias_names, aliased_version, record_move, version_before
from patchloom.platform.tracking.registry import delete_version, described_version
from patchloom.platform.tracking.versions import RegisteredVersion, list_versions

FILES_ARE_KEPT = (
    "MLflow keeps the runs and files of these versions; `mlflow.delete_logged_model(ID)` and then `mlflow gc` "
    "remove the files"
)


@dataclass(frozen=True)
class PrunedVersions:
    """The versions that `prune_model` deleted or would delete, and the old ones that it keeps, with the reasons."""

    name: str
    is_done: bool
    deleted: list[RegisteredVersion]
    kept: dict[str, str]

    def text(self) -> str:
        """One line per version."""
        verb = "deleted" if self.is_done else "would delete"
        lines = [f"{verb} models:/{self.name}/{found.version} (run {found.run_id})" for found in self.deleted]
        lines += [f"kept models:/{self.name}/{version}: {reason}" for version, reason in self.kept.items()]
        if not self.deleted:
            return "\n".join([*lines, f"{self.name} has no version to delete"])
        return "\n".join([*lines, FILES_ARE_KEPT])


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
    if not _is_confirmed(what, yes):
        return "nothing was deleted"
    delete_version(name, version)
    for alias in aliases if list_versions(name, limit=1) else ():
        record_move(name, alias, None, version, "delete")
    return f"deleted models:/{name}/{version}"


def prune_model(name: str, keep: int, *, dry_run: bool = False, yes: bool = False) -> PrunedVersions:
    """Delete old versions of a model: all but the newest ones, those with an alias, and those that a rollback needs.

    MLflow deletes only the entries of the registry. Their runs and files stay; `mlflow.delete_logged_model(ID)` and
    then `mlflow gc` remove the files.

    Args:
        name: the registered model.
        keep: how many of the newest versions to keep.
        dry_run: only say what would be deleted.
        yes: delete without asking; otherwise the terminal asks for confirmation.

    Raises:
        UserError: there is no such model, or `yes` is False and there is no terminal.

    Example:
        found = patchloom.prune_model("my-model", keep=10, dry_run=True)
        print(found.text())
    """
    if keep < 1:
        raise UserError(f"--keep: {keep} is not 1 or more")
    needed = _needed_versions(name)
    old = list_versions(name)[keep:]
    unneeded = [found for found in old if found.version not in needed]
    kept = {found.version: needed[found.version] for found in old if found.version in needed}
    what = f"{len(unneeded)} versions of {name}"
    if dry_run or not unneeded or not _is_confirmed(what, yes):
        return PrunedVersions(name, False, unneeded, kept)
    deleted = []
    for found in unneeded:
        if described_version(name, found.version).aliases:  # it was promoted in the meantime
            kept[found.version] = "it has an alias now"
            continue
        delete_version(name, found.version)
        deleted.append(found)
    return PrunedVersions(name, True, deleted, kept)


def _needed_versions(name: str) -> dict[str, str]:
    """The versions that an alias points at, or that a rollback of an alias would return to, each with the reason."""
    needed: dict[str, str] = {}
    for alias in alias_names(name):
        current = aliased_version(name, alias)
        before = version_before(alias_moves(name, alias), current)
        if before is not None:
            needed.setdefault(before, f"`models rollback` of {alias} would return to it")
        if current is not None:
            needed[current] = f"it is {alias}"
    return needed


def _is_confirmed(what: str, yes: bool) -> bool:
    """Ask the terminal whether to delete; raises UserError if there is none and `yes` is False."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise UserError(f"{what} was not deleted: there is no terminal to ask for confirmation; pass --yes")
    say(f"Delete {what}? [y/N] ")
    return input().strip().lower() in ("y", "yes")
