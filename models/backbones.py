"""Backbones: networks from other packages, imported only if the user allows the package.

Importing a module runs its code, and a model folder may come from anywhere. So a name in a recipe or in `model.json` is
not enough: the user names the packages that a process may import.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ALLOWED = "PATCHLOOM_ALLOW_BACKBONE"  # an environment variable, so that child processes inherit it


def allow_backbones(*packages: str) -> None:
    """Allow this process and its child processes to import networks from these top-level packages."""
    os.environ[ALLOWED] = ",".join(sorted({*allowed_backbones(), *packages}))


def allowed_backbones() -> tuple[str, ...]:
    """The other packages that networks may be imported from."""
    return tuple(filter(None, os.environ.get(ALLOWED, "").split(",")))


def import_allowed(name: str) -> Any:
    """Import a class from an allowed package.

    Args:
        name: `package.module:Class`.

    Raises:
        ValueError: the package is not allowed or cannot be imported, or the module has no such class.
    """
    module_name, _, class_name = name.partition(":")
    package = module_name.partition(".")[0]
    if package not in allowed_backbones():
        raise ValueError(
            f"the class {name} comes from another package, and importing it runs code of that package: "
            f"if you trust it, pass --allow-backbone {package}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"the class {name} cannot be imported ({error}): install the package or set PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"the module {module_name} has no {class_name}: check the name")
    return found


def build_backbone(name: str, options: dict[str, Any]) -> nn.Module:
    """Build a network from an allowed package.

    It is called as `network(x, noise_condition, labels)` with (B, channels_in, H, W), (B,) c_noise and one-hot (B, K)
    or None, and returns (B, channels_out, H, W).

    Args:
        name: `package.module:Class`.
        options: keyword arguments of its constructor: `resolution`, `channels_in` (image, coordinates and
            condition), `channels_out`, `classes`, and those of the recipe.

    Raises:
        ValueError: the package is not allowed or cannot be imported, or has no such network.
    """
    import torch

    network = import_allowed(name)
    try:
        built = network(**options)
    except TypeError as error:
        given = ", ".join(options)
        raise ValueError(
            f"the network {name} does not accept the arguments {given} ({error}): accept them in its constructor"
        ) from error
    if not isinstance(built, torch.nn.Module):
        raise ValueError(f"{name} is a {type(built).__name__} instead of a torch.nn.Module: name a network")
    return built
