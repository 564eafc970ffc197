"""Sampling options: each option of the samplers with its default, limits and help text, declared once."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from math import inf
from typing import Any

from patchloom.errors import did_you_mean

# names of functions: dpmpp-2m is `dpmpp_2m` in `models/samplers.py`, karras is `karras_sigmas` in `models/noise.py`
SAMPLER_NAMES = ("heun", "euler", "ddim", "ancestral", "dpmpp-2m", "dpmpp-2m-sde", "plms")
LADDER_NAMES = ("karras", "vp", "ve", "linear", "iddpm")
CANVASES = ("rescale", "extrapolate", "windows")
MOST_STEPS = 100_000  # far beyond what changes an image
MOST_SIZE_PIXELS = 1 << 26  # height times width of a sampled image
SAMPLING_PRECISIONS = ("fp32", "bf16", "fp16")


def option(
    default: Any,
    help: str,
    choices: Collection[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: the value if none is given.
        help: one line for the command line and the documentation.
        choices: the allowed values; empty for any value.
        minimum: the smallest allowed number.
        maximum: the largest allowed number.
    """
    limits = {"minimum": minimum, "maximum": maximum}
    return field(default=default, metadata={"help": help, "choices": tuple(choices), **limits})


@dataclass(frozen=True)
class SamplingOptions:
    """The options of a sampler.

    Each option is declared here once. The command line, `patchloom.sample`, `patchloom.Sampler`, the parameters of
    MLflow's pyfunc and `sampling.json` derive from these fields.

    Raises:
        ValueError: an option is out of range, or two options contradict each other.
    """

    sampler: str = option("heun", "Sampler", choices=SAMPLER_NAMES)
    steps: int = option(
        18, "Number of noise levels; heun evaluates the network 2 x steps - 1 times", minimum=1, maximum=MOST_STEPS
    )
    ladder: str = option("karras", "Spacing of the noise levels", choices=LADDER_NAMES)
    churn: float = option(
        0.0, "With --sampler heun: total noise added during sampling (EDM's S_churn)", minimum=0, maximum=1e4
    )
    churn_between: tuple[float, float] | None = option(None, "Add the noise of --churn only at these noise levels")
    churn_noise: float = option(
        1.0, "Scale of the noise of --churn (EDM's S_noise), such as 1.003", minimum=0, maximum=100
    )
    guidance: float = option(1.0, "Scale of classifier-free guidance; 1 turns it off", minimum=-100, maximum=100)
    guidance_between: tuple[float, float] | None = option(None, "Guide only at these noise levels")
    size: tuple[int, int] | None = option(None, "Height and width of the images in pixels; default: the trained size")
    canvas: str = option(
        "rescale",
        "Coordinates at another --size: rescale spans [-1, 1] again (Patch Diffusion, section 4.5), extrapolate "
        "continues the trained spacing beyond it; windows denoises overlapping windows of the trained size, each as a "
        "full image, and blends them (MultiDiffusion)",
        choices=CANVASES,
    )
    precision: str = option(
        "fp32",
        "Arithmetic of the network and the autoencoder; the others are faster on GPUs",
        choices=SAMPLING_PRECISIONS,
    )

    def __post_init__(self) -> None:
        for declared in fields(self):
            _check_option(declared.name, getattr(self, declared.name), declared.metadata)
        if self.churn and self.sampler != "heun":
            raise ValueError(f"churn: {self.churn:g} needs the sampler heun, not {self.sampler}; use 0")
        if self.size and self.size[0] * self.size[1] > MOST_SIZE_PIXELS:
            raise ValueError(f"size: {self.size[0]}x{self.size[1]} has more than {MOST_SIZE_PIXELS:,} pixels")
        for name in ("churn_between", "guidance_between"):
            low, high = getattr(self, name) or (0, inf)
            if not 0 <= low < high:
                raise ValueError(f"{name}: {low:g}-{high:g} is not a range of noise levels; use LOW-HIGH such as 0.3-5")


def _check_option(name: str, value: Any, metadata: Mapping[str, Any]) -> None:
    if metadata["choices"] and value not in metadata["choices"]:
        close = did_you_mean(value, metadata["choices"])
        raise ValueError(f"{name}: {value} is unknown{close}; choose one of {', '.join(metadata['choices'])}")
    minimum, maximum = metadata["minimum"], metadata["maximum"]
    if minimum is not None and value is not None and not value >= minimum:
        raise ValueError(f"{name}: {value} is below {minimum:g}")
    if maximum is not None and value is not None and not value <= maximum:
        raise ValueError(f"{name}: {value} is above {maximum:g}")
