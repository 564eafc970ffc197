"""Request limits: what one request to a server of a model may ask for, and how long it may take.

An operator sets them by environment variables, such as `PATCHLOOM_MAX_STEPS=50` for `max_steps`.
"""

import os
import time
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from patchloom.errors import UserError
from patchloom.models.generate import Sampling

ENVIRONMENT_PREFIX = "PATCHLOOM_"


class RequestTooSlow(Exception):
    """A request took longer than it may; the message is one line."""


class RequestLimits(BaseModel):
    """The bounds of a request. One beyond them is refused before any work, except the time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_images: int = Field(1000, ge=1, description="images per request")
    max_side: int = Field(2048, ge=1, description="pixels on each side of an image")
    max_steps: int = Field(1000, ge=1, description="sampling steps")
    max_guidance: float = Field(30.0, ge=1, description="largest scale of guidance, and of its negative")
    max_batch: int = Field(256, ge=1, description="images per network batch, to which every request is padded")
    max_batch_pixels: int = Field(1 << 24, ge=1, description="pixels of all images of a network batch")
    request_timeout_s: float = Field(600.0, gt=0, description="seconds until a request is given up")

    @model_validator(mode="before")
    @classmethod
    def _from_environment(cls, given: Any) -> Any:
        """Fields that are not given have the values of environment variables."""
        bounds = [name for name in cls.model_fields if name.startswith(("max_", "request_"))]
        names = {name: f"{ENVIRONMENT_PREFIX}{name.upper()}" for name in bounds}
        found = {name: os.environ[variable] for name, variable in names.items() if os.environ.get(variable)}
        return found | given if isinstance(given, dict) else given

    def check(self, images: int, sampling: Sampling, batch: int, side: int) -> None:
        """Raise ValueError, which names the bound, for a request beyond a bound.

        Args:
            images: number of images.
            sampling: the options of the sampler.
            batch: images per network batch.
            side: the side of the images of the model, in pixels.
        """
        height, width = sampling.size or (side, side)
        if images > self.max_images:
            raise ValueError(f"seeds: {images} images are more than {self.max_images} per request (max_images)")
        if sampling.steps > self.max_steps:
            raise ValueError(f"steps: {sampling.steps} are more than {self.max_steps} (max_steps)")
        if abs(sampling.guidance) > self.max_guidance:
            raise ValueError(f"guidance: {sampling.guidance:g} is beyond {self.max_guidance:g} (max_guidance)")
        if sampling.size and max(height, width) > self.max_side:
            raise ValueError(f"size: {height}x{width} is larger than {self.max_side} pixels (max_side)")
        if batch > self.max_batch:
            raise ValueError(f"batch: {batch} images are more than {self.max_batch} (max_batch)")
        if batch * height * width > self.max_batch_pixels:
            raise ValueError(
                f"size: {batch} images of {height}x{width} have more than {self.max_batch_pixels:,} pixels "
                "(max_batch_pixels)"
            )

    def deadline(self) -> "Deadline":
        """The deadline of a request that arrives now."""
        return Deadline(time.monotonic() + self.request_timeout_s, self.request_timeout_s)


class Deadline:
    """When a request is given up.

    Args:
        at_s: the time of `time.monotonic`.
        seconds: the time that the request had, for the message.
    """

    def __init__(self, at_s: float, seconds: float) -> None:
        self.at_s, self.seconds = at_s, seconds

    def check(self) -> None:
        """Raise RequestTooSlow after the deadline. Samplers call it before each evaluation of the network."""
        if time.monotonic() > self.at_s:
            raise RequestTooSlow(
                f"no image within {self.seconds:g} seconds (request_timeout_s): ask for fewer images or steps"
            )


def limits_of_environment() -> RequestLimits:
    """The limits that environment variables give; raises UserError if one of them is wrong."""
    try:
        return RequestLimits()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        variable = f"{ENVIRONMENT_PREFIX}{str(first['loc'][0]).upper()}"
        raise UserError(f"{variable}={first['input']}: {first['msg']}") from None
