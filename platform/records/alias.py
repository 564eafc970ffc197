"""The record of one move of an alias, as a tag of the registered model keeps it."""

from patchloom.platform.records.record import VersionedRecord


class AliasMove(VersionedRecord):
    """When an alias was moved, from which version to which, and why."""

    format_version: int = 1
    alias: str
    version: str | None  # None: the alias was removed with its version
    previous: str | None  # the version before; None if the alias was new
    moved_unix_s: float
    action: str  # register, promote, rollback or delete
    reason: str = ""  # such as `FID 11.75 compared with 12`
