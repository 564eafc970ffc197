"""Backbones: networks from outside this package, imported only after their package was allowed by name.

Importing a module runs it, and a model folder may come from anywhere: so a name in a recipe or a
`model.json` is not enough, and whoever starts the process says which packages it may import.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

ALLOWED = "PATCHLOOM_ALLOW_BACKBONE"  # in the environment, so that worker processes have it too


def allow_backbones(*packages: str) -> None:
    """Let this process, and those that it starts, import networks from these top-level packages."""
    os.environ[ALLOWED] = ",".join(sorted({*allowed_backbones(), *packages}))


def allowed_backbones() -> tuple[str, ...]:
    """The packages that networks may be imported from, beside this one."""
    return tuple(filter(None, os.environ.get(ALLOWED, "").split(",")))


def import_allowed(name: str) -> Any:
    """What `package.module:Class` names; raises ValueError where its package was not allowed or holds no such class."""
    module_name, _, class_name = name.partition(":")
    package = module_name.partition(".")[0]
    if package not in allowed_backbones():
        raise ValueError(
            f"the network {name} is not patchloom's, and importing it runs its code: "
            f"if you trust it, give --allow-backbone {package}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"the network {name} cannot be imported ({error}): install it or set PYTHONPATH") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"the module {module_name} holds no {class_name}: check the network's name")
    return found


def build_backbone(name: str, options: dict[str, Any]) -> nn.Module:
    """The network `package.module:Class`, built with `options` as keyword arguments.

    options: `resolution`, `channels_in` (image and coordinates), `channels_out`, `classes`, and what the
    recipe adds. The network is called as `net(x, noise_condition, labels)`: (B, channels_in, H, W),
    (B,) c_noise and one-hot (B, K) or None -> (B, channels_out, H, W). Raises ValueError where the package
    was not allowed, does not import, or holds no such network.
    """
    import torch

    network = import_allowed(name)
    try:
        built = network(**options)
    except TypeError as error:
        given = ", ".join(options)
        raise ValueError(f"the network {name} was not built with {given} ({error}): let it take them") from error
    if not isinstance(built, torch.nn.Module):
        raise ValueError(f"{name} gives a {type(built).__name__}, and a torch.nn.Module was wanted")
    return built
