"""The three networks of EDM, small enough for tests, with everything that a network can have."""

from typing import Any

from patchloom.models.augment import LABELS
from patchloom.models.cards import DenoiserConfig

SIDE = 16
_SMALL = {"width": 8, "width_multipliers": [1, 2], "blocks": 1, "attention": [8], "dropout": 0.1}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPM++": ("song", _SMALL),
    "NCSN++": ("song", {**_SMALL, "embedding": "fourier", "residual_input": True, "filter_taps": [1, 3, 3, 1],
                        "noise_width_multiplier": 2}),
    "ADM": ("dhariwal", {**_SMALL, "head_width": 8}),
}  # fmt: skip


def small_config(network: str, *, augmentation: bool = False, **changes: Any) -> DenoiserConfig:
    """The description of one of `NETWORKS` on images of 16 pixels; `changes` replace its fields."""
    name, options = NETWORKS[network]
    if augmentation:
        options = {**options, "augmentation": LABELS}
    if changes.get("coordinates") == "implicit":
        options = {**options, "stem": [8, 8]}
    fields = {"resolution": SIDE, "channels": 3, "classes": 0, "coordinates": "linear", "sigma_data": 0.5, **changes}
    return DenoiserConfig(network=name, network_options=options, **fields)
