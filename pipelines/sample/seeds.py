"""Seeds: which images are sampled, and which class each one has."""

from collections.abc import Sequence

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.generate import class_number, default_labels
from patchloom.platform.dataset.label_files import read_labels
from patchloom.platform.dataset.labels import Label, column_of_labels
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import existing_file, whole_number

SEED_COLUMNS = ("seed", "key")
SEEDS_IN_ERROR = 5


def parse_seeds(text: str) -> list[int]:
    """`0-63`, `0,5,9`, a mix of both, or a file with one seed per line; sorted, without duplicates."""
    path, shown = existing_file(text), text if len(text) <= 80 else f"{text[:77]}..."
    parts = path.read_text().split() if path else text.split(",")
    seeds: set[int] = set()
    for part in parts:
        first, dash, last = part.strip().partition("-")
        low, high = whole_number(first), whole_number(last if dash else first)
        if low is None or high is None:
            raise UserError(f"--seeds {shown}: {part[:80]!r} is not a seed; write 0-63, 0,5,9 or a file of seeds")
        if max(low, high) >= 2**63:
            raise UserError(f"--seeds {shown}: {max(low, high)} is too large; seeds are below 2^63")
        seeds.update(range(low, high + 1))
    if not seeds:
        raise UserError(f"--seeds {shown}: contains no seed; write 0-63, 0,5,9 or a file of seeds")
    return sorted(seeds)


def choose_labels(
    seeds: list[int], card: ModelCard, label: str | int | None, labels: str | None
) -> tuple[dict[int, int], str, int | None]:
    """Choose the class of every seed.

    Args:
        seeds: the seeds.
        card: the card of the model.
        label: one class for all seeds, by name or number.
        labels: a file with the class of each seed. Without `label` and `labels`, all classes that have training images
            take turns.

    Returns:
        The class number of every seed (-1: none), and the `labels` and `label` of `sampling.json`.

    Raises:
        UserError: the model does not know a class, or a seed has none in the file.
    """
    if label is not None and labels is not None:
        raise UserError(f"--label {label} and --labels {labels} exclude each other: give one of them")
    if labels is not None:
        return _labels_of_file(seeds, card.class_names, labels), "file", None
    if label is not None:
        number = _class_number(label, card.class_names, f"--label {label}")
        return dict.fromkeys(seeds, number), "fixed", number
    return dict(zip(seeds, default_labels(seeds, card.sampled_classes), strict=True)), "balanced", None


def _labels_of_file(seeds: list[int], class_names: Sequence[str], address: str) -> dict[int, int]:
    """The classes in a table with columns `seed` and `label`, or in a `.txt` whose first line is seed 0.

    A column of plain numbers is class numbers, also if classes are named by numbers; other text is class names.
    """
    found = _labels_of_lines(address) if address.endswith(".txt") else read_labels(address, SEED_COLUMNS).by_key()
    missing = [str(seed) for seed in seeds if str(seed) not in found]
    if missing:
        named = ", ".join(missing[:SEEDS_IN_ERROR]) + (", ..." if len(missing) > SEEDS_IN_ERROR else "")
        raise UserError(f"--labels {address}: {len(missing)} of the seeds have no label ({named}): add them")
    wanted = {found[str(seed)] for seed in seeds}
    numbers = {label: _class_number(label, class_names, f"--labels {address}: {label}") for label in wanted}
    return {seed: numbers[found[str(seed)]] for seed in seeds}


def _labels_of_lines(address: str) -> dict[str, Label]:
    folder, name = Folder.of_file(address)
    if not folder.has(name):
        raise UserError(f"--labels {address}: there is no such file")
    lines = [line.strip() for line in folder.read(name).decode().splitlines()]
    return {str(seed): label for seed, label in enumerate(column_of_labels(lines))}


def _class_number(label: int | str | None, class_names: Sequence[str], option: str) -> int:
    try:
        return class_number(label, class_names)
    except ValueError as error:
        raise UserError(f"{option} {error}") from None
