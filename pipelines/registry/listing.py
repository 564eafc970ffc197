"""Listing: registered versions as a table."""

import time

from patchloom.pipelines.registry.quality import evaluations_of
from patchloom.platform.progress import fitted
from patchloom.platform.tracking.store import shown_registry_uri
from patchloom.platform.tracking.versions import RegisteredVersion

HEADER = ("MODEL", "ALIASES", "KIND", "SIDE", "P", "SCHEDULE", "IMAGES", "QUALITY", "AGE")
LEAST_IMPORTANT = ("SIDE", "SCHEDULE", "KIND", "IMAGES", "P", "AGE")  # on a terminal that is too narrow for all
AGE_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))  # and their seconds


def models_table(versions: list[RegisteredVersion]) -> str:
    """Registered versions as a table: aliases, kind, resolution, p, images seen, quality and age."""
    return fitted([HEADER, *(_table_line(version) for version in versions)], LEAST_IMPORTANT)


def empty_list(is_filtered: bool) -> str:
    """What `models list` prints if there is nothing to list."""
    return f"no {'version meets the conditions' if is_filtered else 'model is registered'} at {shown_registry_uri()}"


def _table_line(version: RegisteredVersion) -> tuple[str, ...]:
    tags = version.tags
    images_seen = f"{int(tags['images_seen']):,}" if "images_seen" in tags else ""
    return (
        f"{version.name}/{version.version}",
        ",".join(version.aliases),
        *(tags.get(key, "") for key in ("kind", "resolution", "p", "schedule")),
        images_seen,
        quality_text(tags),
        _age_text(time.time() - version.created_unix_s),
    )


def quality_text(tags: dict[str, str]) -> str:
    """The most reliable quality of a version: its evaluation with the most samples, else a number from training."""
    evaluations = evaluations_of(tags)
    if evaluations:
        return evaluations[0].headline()
    if "psnr_db" in tags:
        return f"PSNR {float(tags['psnr_db']):.1f} dB"
    return f"held-out loss {tags['held_out_loss']}" if "held_out_loss" in tags else ""


def _age_text(seconds: float) -> str:
    unit, size = next((unit for unit in AGE_UNITS if seconds >= unit[1]), AGE_UNITS[-1])
    return f"{int(seconds // size)}{unit}"
