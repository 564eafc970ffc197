"""Names: which names of registered models and which aliases MLflow and model references can hold."""

import re

from patchloom.errors import UserError

# `models:/NAME@ALIAS` and MLflow's searches and addresses give these characters a meaning
RESERVED_IN_NAMES = "/:@'\"\\%?#"
MAX_CHARACTERS = 255


def check_name(name: str) -> str:
    """The name of a registered model; raises UserError if MLflow or a reference cannot hold it."""
    bad = sorted({character for character in name if character in RESERVED_IN_NAMES or not character.isprintable()})
    if bad:
        raise UserError(
            f"{name!r} cannot name a model because of {' '.join(map(repr, bad))}: use letters, digits, _ - ."
        )
    if name.strip() != name or name in ("", ".", "..") or len(name) > MAX_CHARACTERS:
        raise UserError(
            f"{name[:80]!r} cannot name a model: use 1 to {MAX_CHARACTERS} letters, digits, _ - . without outer spaces"
        )
    return name


def check_alias(alias: str) -> str:
    """The alias of a version; raises UserError if MLflow does not accept it."""
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise UserError(f"the alias {alias!r} is reserved by MLflow: choose another one, such as champion")
    if not re.fullmatch(r"[\w-]+", alias) or len(alias) > MAX_CHARACTERS:
        raise UserError(f"{alias[:80]!r} is not an alias: use 1 to {MAX_CHARACTERS} letters, digits, _ and -")
    return alias
