"""History: which version an alias pointed at and why, and the way back to the version before."""

import time
from dataclasses import dataclass

from patchloom.errors import UserError
from patchloom.platform.records.alias import AliasMove
from patchloom.platform.tracking.aliases import alias_moves, aliased_version, move_alias, version_before
from patchloom.platform.tracking.registry import has_version


@dataclass(frozen=True)
class AliasHistory:
    """The moves of an alias, oldest first, the version it points at, and the one that a rollback goes back to."""

    name: str
    alias: str
    current: str | None
    before: str | None
    moves: list[AliasMove]

    def text(self) -> str:
        """One line per move, newest first."""
        if not self.moves:
            state = f"is version {self.current}" if self.current else "does not exist"
            return f"models:/{self.name}@{self.alias} {state}; no move is recorded"
        lines = [_move_line(move) for move in reversed(self.moves)]
        if self.moves[-1].version != self.current:
            lines.insert(0, f"now: version {self.current or 'none'}, moved by another program")
        return "\n".join(lines)


def _move_line(move: AliasMove) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(move.moved_unix_s))
    before = f" replaced version {move.previous}" if move.previous else ""
    what = f"version {move.version}{before}" if move.version else f"version {move.previous} was deleted"
    return f"{when}  {what}: {move.action}" + (f", {move.reason}" if move.reason else "")


def alias_history(name: str, alias: str = "champion") -> AliasHistory:
    """Which version an alias pointed at, what replaced it, and by which metric. MLflow keeps the last 30 moves.

    Args:
        name: the registered model.
        alias: the alias.

    Raises:
        UserError: there is no such model, or MLflow does not answer.

    Example:
        history = patchloom.alias_history("my-model")
        print(history.current, history.before)
        print(history.text())
    """
    moves = alias_moves(name, alias)
    current = aliased_version(name, alias)
    return AliasHistory(name, alias, current, version_before(moves, current), moves)


def rollback_alias(name: str, alias: str = "champion") -> str:
    """Move an alias back to the version before. A second call goes one version further back.

    Args:
        name: the registered model.
        alias: the alias to move.

    Returns:
        What was done, in words.

    Raises:
        UserError: no version before is known, or it was deleted. The alias then stays where it was.

    Example:
        if patchloom.alias_history("my-model").before is not None:
            patchloom.rollback_alias("my-model")
    """
    history = alias_history(name, alias)
    what = f"models:/{name}@{alias}"
    advice = f"choose a version with `patchloom models promote {name} VERSION --alias {alias}`"
    if history.before is None:
        raise UserError(f"{what} has no version before {history.current or 'it'} in its history: {advice}")
    if not has_version(name, history.before):
        raise UserError(f"version {history.before}, which {what} was before, is deleted: {advice}")
    reason = f"from version {history.current}" if history.current else ""
    move_alias(name, alias, history.before, "rollback", reason)
    return f"{what} is version {history.before} again" + (f", not {history.current}" if history.current else "")
