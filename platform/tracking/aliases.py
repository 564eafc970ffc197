"""Aliases: they are moved from version to version, and MLflow keeps the moves as tags of the registered model.

Each move is a tag of its own, so that two moves at the same time are both kept.
"""

import secrets
import time
from typing import Any

from patchloom.errors import UserError
from patchloom.platform.records.alias import AliasMove
from patchloom.platform.tracking.client import open_registry
from patchloom.platform.tracking.registry import MISSING, find_version

KEPT_MOVES = 30  # per alias
# Followed by the alias, a dot, the time and a random number. MLflow's pages hide tags that begin with `mlflow.`.
TAG_OF_MOVES = "mlflow.patchloom.alias."
OLD_TAG_OF_MOVES = "patchloom.alias."  # of versions up to 0.1, which is still read


def aliased_version(name: str, alias: str) -> str | None:
    """The number of the version with an alias; None if there is no such name or alias."""
    from mlflow.exceptions import MlflowException

    with open_registry() as client:
        try:
            return str(client.get_model_version_by_alias(name, alias).version)
        except MlflowException as error:
            if error.error_code in MISSING:
                return None
            raise


def move_alias(name: str, alias: str, version: str, action: str, reason: str = "") -> None:
    """Point an alias at a version and record the move, unless it points there already.

    Raises:
        UserError: there is no such version.
    """
    find_version(name, version=version)
    before = aliased_version(name, alias)
    if before == version:
        return
    with open_registry() as client:
        client.set_registered_model_alias(name, alias, version)
    record_move(name, alias, version, before, action, reason)


def record_move(name: str, alias: str, version: str | None, before: str | None, action: str, reason: str = "") -> None:
    """Add a move to the history of an alias, and drop the oldest moves of a long history."""
    now = time.time()
    move = AliasMove(
        alias=alias, version=version, previous=before, moved_unix_s=round(now, 3), action=action, reason=reason
    )
    with open_registry() as client:
        tag = f"{TAG_OF_MOVES}{alias}.{int(now * 1000):015d}-{secrets.token_hex(3)}"
        client.set_registered_model_tag(name, tag, move.to_json())
        tags = client.get_registered_model(name).tags
        for old in _move_tags(tags, alias)[:-KEPT_MOVES]:
            client.delete_registered_model_tag(name, old)


def alias_moves(name: str, alias: str) -> list[AliasMove]:
    """The recorded moves of an alias, oldest first.

    Raises:
        UserError: there is no such model.
    """
    tags = dict(_registered_model(name).tags)
    return [AliasMove.parse(tags[key], f"the tag {key} of {name}") for key in _move_tags(tags, alias)]


def alias_names(name: str) -> list[str]:
    """The aliases that a model has, and those that it had and whose history is kept."""
    model = _registered_model(name)
    had = {alias for key in model.tags if (alias := _alias_of(key)) is not None}
    return sorted({*model.aliases, *had})


def _registered_model(name: str) -> Any:
    from mlflow.exceptions import MlflowException

    with open_registry() as client:
        try:
            return client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code in MISSING:
                raise UserError(f"{name} is not a registered model: list them with `patchloom models list`") from None
            raise


def _move_tags(tags: dict[str, str], alias: str) -> list[str]:
    """The keys of the moves of one alias, by the time after the last dot."""
    return sorted((key for key in tags if _alias_of(key) == alias), key=lambda key: key.rpartition(".")[2])


def _alias_of(key: str) -> str | None:
    """The alias whose move a tag records; None for other tags."""
    for prefix in (TAG_OF_MOVES, OLD_TAG_OF_MOVES):
        if key.startswith(prefix):
            return key.removeprefix(prefix).partition(".")[0]
    return None


def versions_in_turn(moves: list[AliasMove]) -> list[str]:
    """The versions that an alias would go back through, newest last.

    A rollback ends what came after the version it returned to, so a second rollback goes one version further back.
    """
    turn: list[str] = []
    for move in moves:
        if move.previous is not None and turn[-1:] != [move.previous]:
            turn.append(move.previous)  # moved by another program, or before there was a history
        if move.version is None:
            turn.pop()
        elif move.action == "rollback" and move.version in turn:
            del turn[len(turn) - turn[::-1].index(move.version) :]
        else:
            turn.append(move.version)
    return turn


def version_before(moves: list[AliasMove], current: str | None) -> str | None:
    """The version that an alias pointed at before its current one; None if that is not known."""
    turn = versions_in_turn(moves)
    while turn and turn[-1] == current:
        turn.pop()
    return turn[-1] if turn else None
