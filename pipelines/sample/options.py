"""The options of `patchloom sample`, declared once for the command line, Python and pyfunc."""

import re
from dataclasses import asdict, dataclass, fields
from inspect import Parameter
from typing import TYPE_CHECKING

from patchloom.errors import UserError
from patchloom.models.sampling_options import SamplingOptions, option

if TYPE_CHECKING:
    from patchloom.models.generate import Sampling

# declared here because `formats.py` imports numpy and pyarrow
FORMAT_NAMES = ("png", "zip", "webdataset", "parquet", "npz")
INPAINTING_METHODS = ("reconstruct", "resample", "replace")
DEFAULT_BATCH = 8  # on CPUs, and wherever requests are small


@dataclass(frozen=True)
class SampleOptions(SamplingOptions):
    """What `patchloom sample` makes of a model and seeds: the sampler's options, the classes and the files."""

    label: str | None = option(None, "One class for all seeds, by name or number; default: all classes in turn")
    labels: str | None = option(
        None, "A file with the class of each seed: .csv, .jsonl or .parquet with columns seed and label, or .txt"
    )
    conditions: str | None = option(
        None,
        "For models with a condition: a folder of edge images, masks, arrays, ..., or a dataset prepared with "
        "--condition; seed i follows the i-th one, and they take turns",
    )
    outpaint: str | None = option(None, "An image file that fills the center; the rest of a larger --size is sampled")
    inpaint: str | None = option(None, "An image file of which the white part of --mask is kept; the rest is sampled")
    mask: str | None = option(None, "With --inpaint: an image file of the same size, white where pixels are kept")
    outpaint_method: str = option(
        "reconstruct",
        "How --outpaint and --inpaint fit the rest to the kept pixels: reconstruct (with gradients through the "
        "network), resample (each step 4 times), both at 4 times the cost, or replace (leaves visible borders)",
        choices=INPAINTING_METHODS,
    )
    format: str = option("png", "File format", choices=FORMAT_NAMES)
    shard_size: int | None = option(None, "Images per archive (default 1000) and per unit of work", minimum=1)
    batch: int | None = option(
        None,
        "Images per network batch; the bytes of the images depend on it. By default that of the folder, and of a new "
        "folder 8 on CPUs and up to 64 on GPUs, by their memory",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.inpaint is None) != (self.mask is None):
            raise ValueError("inpaint and mask: one needs the other; give both --inpaint IMAGE and --mask MASK")
        if self.inpaint is not None and self.outpaint is not None:
            raise ValueError("inpaint and outpaint: only one image can be kept; leave one of them out")

    def sampling(self) -> "Sampling":
        """The options of the sampler alone."""
        from patchloom.models.generate import Sampling

        return Sampling(**{name: value for name, value in asdict(self).items() if name in SAMPLER_OPTIONS})


SAMPLER_OPTIONS = frozenset(declared.name for declared in fields(SamplingOptions))


def option_parameters() -> list[Parameter]:
    """The options as keyword-only parameters of a function's signature."""
    return [
        Parameter(declared.name, Parameter.KEYWORD_ONLY, default=declared.default, annotation=declared.type)
        for declared in fields(SampleOptions)
    ]


def sampler_parameters() -> list[Parameter]:
    """The options of the sampler and `batch`, as parameters: all that images depend on, with model, seed and class."""
    options = [parameter for parameter in option_parameters() if parameter.name in SAMPLER_OPTIONS]
    return [*options, Parameter("batch", Parameter.KEYWORD_ONLY, default=DEFAULT_BATCH, annotation=int)]


def parse_size(text: str, name: str = "--size") -> tuple[int, int]:
    """`96x128` -> (96, 128): height first."""
    match = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", text.lower())
    if not match:
        raise UserError(f"{name}: {text[:80]} is not HxW, such as 96x128")
    return int(match[1]), int(match[2])


def parse_levels(text: str, name: str) -> tuple[float, float]:
    """`0.3-5` -> (0.3, 5.0): two noise levels."""
    low, _, high = text.partition("-")
    try:
        return float(low), float(high)
    except ValueError:
        raise UserError(f"{name}: {text[:80]} is not LOW-HIGH, such as 0.3-5") from None
