"""Transfer: copy weights between networks that may differ in classes, resolution or coordinates."""

import re

import torch
from torch import Tensor

from patchloom.models.denoiser import Denoiser
from patchloom.models.patches import COORDINATE_CHANNELS

LEVEL = re.compile(r"\.(\d+)x\1_")  # the resolution of a level in EDM's parameter names
CLASS_WEIGHTS = "map_label."


@torch.no_grad()
def transfer(target: Denoiser, source: Denoiser) -> list[str]:
    """Copy the weights of `source` into `target`.

    Levels match by their number of halvings, so the resolutions may differ. If the classes differ, the class
    embedding keeps its fresh weights. If only the target has coordinates or a condition, their channels of the first
    convolution become 0, so that the target starts as the source.

    Args:
        target: the network to change.
        source: the network to copy from.

    Returns:
        The names of the weights that were not copied.

    Raises:
        ValueError: any other name or shape differs; the message names up to three.
    """
    source_weights = {_by_level(name, source.resolution): tensor for name, tensor in source.state_dict().items()}
    target_weights = {_by_level(name, target.resolution): tensor for name, tensor in target.state_dict().items()}
    fresh, problems = [], []
    for name, tensor in target_weights.items():
        given = source_weights.pop(name, None)
        if given is not None and given.shape == tensor.shape:
            tensor.copy_(given)
        elif given is not None and (more := _only_more_input(tensor, given, target, source)):
            tensor.zero_()[:, : given.shape[1]] = given
            fresh.append(f"{name} ({more})")
        elif CLASS_WEIGHTS in name:
            fresh.append(name)
        else:
            problems.append(f"{name} is {_shape(tensor)} and the source has {_shape(given)}")
    problems += [
        f"{name} is missing and the source has {_shape(given)}"
        for name, given in source_weights.items()
        if CLASS_WEIGHTS not in name
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"the networks differ: {'; '.join(problems[:3])}{more}: use the network of the source in the recipe"
        )
    return fresh


def _by_level(name: str, resolution: int) -> str:
    def level(match: re.Match[str]) -> str:
        return f".level{(resolution // int(match[1])).bit_length() - 1}_"

    return LEVEL.sub(level, name)


def _only_more_input(tensor: Tensor, given: Tensor, target: Denoiser, source: Denoiser) -> str:
    """What only the input of the target has, if this is a convolution of the input and all else is equal; or nothing.

    The channels of the input are those of the image, of the coordinates, and of the condition.
    """
    has_coordinates = source.coordinates == "none" and target.coordinates != "none"
    has_condition = not source.condition_channels and target.condition_channels > 0
    added = {"coordinates": has_coordinates, "condition": has_condition}
    is_equal_else = (
        (has_coordinates or source.coordinates == target.coordinates)
        and (has_condition or source.condition_channels == target.condition_channels == 0)
        and source.channels == target.channels
    )
    is_of_input = (
        tensor.dim() == given.dim() == 4
        and given.shape[1] == _input_channels(source)
        and tensor.shape[1] == _input_channels(target) > given.shape[1]
        and tensor.shape[0] == given.shape[0]
        and tensor.shape[2:] == given.shape[2:]
    )
    return " and ".join(name for name, is_new in added.items() if is_new) if is_equal_else and is_of_input else ""


def _input_channels(denoiser: Denoiser) -> int:
    return denoiser.channels + COORDINATE_CHANNELS[denoiser.coordinates] + denoiser.condition_channels


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else " x ".join(map(str, tensor.shape))
