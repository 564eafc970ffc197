"""Sample: seeds in, images out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from patchloom.pipelines.sample.sampling import sample as sample


def __getattr__(name: str) -> object:  # the command line reads the options without torch
    if name == "sample":
        from patchloom.pipelines.sample.sampling import sample

        return sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
