"""Seeds: which images are asked for, which class each one is of, and the sizes and levels that options name."""

import re
from pathlib import Path
from typing import Any

from patchloom.errors import UserError
from patchloom.models.generate import class_number, default_labels
from patchloom.platform.dataset.labels import read_labels
from patchloom.platform.files.folder import Folder

SEED_COLUMNS = ("seed", "key")
NAMED = 5  # how many seeds an error names


def parse_seeds(text: str) -> list[int]:
    """`0-63`, `0,5,9`, both mixed, or a file with one seed a line; sorted, without repeats."""
    path = Path(text)
    parts = path.read_text().split() if path.is_file() else text.split(",")
    seeds: set[int] = set()
    for part in parts:
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"--seeds {text}: {part!r} is not a seed; write 0-63, 0,5,9 or a file of seeds")
        seeds.update(range(int(first), int(last) + 1) if dash else [int(first)])
    if not seeds:
        raise UserError(f"--seeds {text} names no seed: write 0-63, 0,5,9 or a file of seeds")
    if max(seeds) >= 2**63:
        raise UserError(f"--seeds {text}: {max(seeds)} is too large; seeds are below 2^63")
    return sorted(seeds)


def parse_size(text: str) -> tuple[int, int]:
    """`96x128` -> (96, 128), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text.lower())
    if not match:
        raise UserError(f"--size {text} is not of the form HxW, such as 96x128")
    return int(match[1]), int(match[2])


def parse_levels(text: str, option: str) -> tuple[float, float]:
    """`0.3-5` -> (0.3, 5.0), two noise levels."""
    low, _, high = text.partition("-")
    try:
        return float(low), float(high)
    except ValueError:
        raise UserError(f"{option} {text} is not of the form LOW-HIGH, such as 0.3-5") from None


def choose_labels(
    seeds: list[int], class_names: list[str], label: str | None, labels: str | None
) -> tuple[dict[int, int], dict[str, Any]]:
    """The class number of every seed (-1 for none), and how they were chosen, as `sampling.json` says it.

    label: one class for all, by name or number. labels: a file with the class of each seed. Neither: all classes
    in turn. Raises UserError for a class that the model does not know, or a seed without one.
    """
    if label is not None and labels is not None:
        raise UserError("--label is one class for all seeds and --labels a file of classes: give one of them")
    if labels is not None:
        return _labels_of_file(seeds, class_names, labels), {"labels": "file", "label": None}
    if label is not None:
        number = _known(label, class_names, f"--label {label}")
        return dict.fromkeys(seeds, number), {"labels": "fixed", "label": number}
    return dict(zip(seeds, default_labels(seeds, len(class_names)), strict=True)), {"labels": "balanced", "label": None}


def _labels_of_file(seeds: list[int], class_names: list[str], address: str) -> dict[int, int]:
    """By a table's columns `seed` and `label`, or, in a `.txt`, by the line: the first is seed 0's."""
    told: dict[str, Any] = {}
    if address.endswith(".txt"):
        folder, name = Folder.of_file(address)
        if not folder.has(name):
            raise UserError(f"--labels {address} does not exist: give a file of labels")
        told = {str(seed): line.strip() for seed, line in enumerate(folder.read(name).decode().splitlines())}
    else:
        told = read_labels(address, SEED_COLUMNS).of
    missing = [str(seed) for seed in seeds if str(seed) not in told]
    if missing:
        named = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        raise UserError(f"--labels {address} has no label for {len(missing)} of the seeds ({named}): add them")
    numbers = {label: _known(label, class_names, f"--labels {address}: {label}") for label in set(told.values())}
    return {seed: numbers[told[str(seed)]] for seed in seeds}


def _known(label: int | str | None, class_names: list[str], what: str) -> int:
    try:
        return class_number(label, class_names)
    except ValueError as error:
        raise UserError(f"{what} {error}") from None
