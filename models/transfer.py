"""Transfer: a network begins with the weights of another that may differ in classes, resolution or coordinates."""

import re

import torch
from torch import Tensor

from patchloom.models.denoiser import Denoiser

LEVEL = re.compile(r"\.(\d+)x\1_")  # EDM's names hold the resolution of a level
CLASS_WEIGHTS = "map_label."


@torch.no_grad()
def transfer(target: Denoiser, source: Denoiser) -> list[str]:
    """Copy the weights of `source` into `target`, level by level, and say what was left as it was drawn.

    Levels are matched by how often they are halved, so that resolutions may differ. The class embedding
    stays fresh where the classes differ; where only the target has coordinates, their channels of the first
    convolution begin at 0, so that it starts as the source. Raises ValueError, naming what differs, where
    anything else does not match in name or shape.
    """
    theirs = {_by_level(name, source.resolution): tensor for name, tensor in source.state_dict().items()}
    ours = {_by_level(name, target.resolution): tensor for name, tensor in target.state_dict().items()}
    left, problems = [], []
    for name, tensor in ours.items():
        given = theirs.pop(name, None)
        if given is not None and given.shape == tensor.shape:
            tensor.copy_(given)
        elif given is not None and _only_coordinates_more(tensor, given, target, source):
            tensor.zero_()[:, : given.shape[1]] = given
            left.append(f"{name} (coordinates)")
        elif CLASS_WEIGHTS in name:
            left.append(name)
        else:
            problems.append(f"{name} is {_shape(tensor)} and was {_shape(given)}")
    problems += [
        f"{name} is none and was {_shape(given)}" for name, given in theirs.items() if CLASS_WEIGHTS not in name
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"the networks differ: {'; '.join(problems[:3])}{more}: give the recipe the source's network")
    return left


def _by_level(name: str, resolution: int) -> str:
    def level(match: re.Match[str]) -> str:
        return f".level{(resolution // int(match[1])).bit_length() - 1}_"

    return LEVEL.sub(level, name)


def _only_coordinates_more(tensor: Tensor, given: Tensor, target: Denoiser, source: Denoiser) -> bool:
    """Whether this is the first convolution, of a source that sees the image alone."""
    return (
        source.coordinates == "none"
        and target.coordinates != "none"
        and tensor.dim() == given.dim() == 4
        and given.shape[1] == source.channels == target.channels
        and tensor.shape[0] == given.shape[0]
        and tensor.shape[2:] == given.shape[2:]
        and tensor.shape[1] > given.shape[1]
    )


def _shape(tensor: Tensor | None) -> str:
    return "none" if tensor is None else " x ".join(map(str, tensor.shape))
