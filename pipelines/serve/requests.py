"""Requests: what a client may ask for, checked against the limits of the server before any work."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from patchloom.errors import UserError
from patchloom.models.cards import ModelCard
from patchloom.models.generate import Sampling, check_fit
from patchloom.pipelines.sample.request_limits import RequestLimits
from patchloom.pipelines.sample.sampler import class_numbers, refuse_condition

LARGEST_SEED = 2**64 - 1
LONGEST_ANSWER = 500  # characters of a refusal, which may repeat what the request had


class ServerLimits(RequestLimits):
    """The bounds of a server. A request beyond them is refused."""

    max_images: int = Field(16, ge=1, description="images per request")
    max_side: int = Field(512, ge=1, description="pixels on each side of an image")
    max_steps: int = Field(100, ge=1, description="sampling steps")
    max_body_bytes: int = Field(65_536, ge=1, description="bytes of a request")
    request_timeout_s: float = Field(120.0, gt=0, description="seconds until a request is given up")


class RefusedRequest(Exception):
    """A request that is not served, with its HTTP status and one line that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class SampleRequest(BaseModel):
    """The body of `POST /sample`: seeds, classes, and the options of the sampler."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: list[Annotated[int, Field(ge=0, le=LARGEST_SEED, strict=True)]] = Field(min_length=1)
    labels: list[str | StrictInt | None] | None = (
        None  # a class per seed by name or number; None: the default of the seed
    )
    format: Literal["json", "png"] = "json"
    sampler: str = "heun"
    steps: StrictInt = 18
    ladder: str = "karras"
    churn: float = 0.0
    churn_between: tuple[float, float] | None = None
    churn_noise: float = 1.0
    guidance: float = 1.0
    guidance_between: tuple[float, float] | None = None
    size: tuple[StrictInt, StrictInt] | None = None
    canvas: str = "rescale"
    precision: str = "fp32"

    def sampling(self) -> Sampling:
        """The options of the sampler; raises ValueError if they contradict each other."""
        return Sampling(**self.model_dump(exclude={"seeds", "labels", "format"}))


@dataclass(frozen=True)
class CheckedRequest:
    """A request that the server can sample: seeds, class numbers and options."""

    seeds: list[int]
    classes: list[int]
    sampling: Sampling
    format: Literal["json", "png"]


def checked_request(body: bytes, card: ModelCard, limits: ServerLimits, batch: int) -> CheckedRequest:
    """Read a request.

    Args:
        body: JSON with the fields of `SampleRequest`.
        card: the model of the server.
        limits: the bounds of the server.
        batch: images per network batch.

    Raises:
        RefusedRequest: the body is not JSON (400), or a value is wrong, beyond a limit or not one of the model (422).
    """
    try:
        request = SampleRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None
    try:
        sampling = request.sampling()
        _check_counts(request)
        limits.check(len(request.seeds), sampling, batch, card.image_side)
        check_fit(sampling, card)
        refuse_condition(card)
        classes = class_numbers(request.seeds, request.labels, card)
    except (ValueError, UserError) as error:
        raise RefusedRequest(422, " ".join(str(error).split())[:LONGEST_ANSWER]) from None
    return CheckedRequest(seeds=request.seeds, classes=classes, sampling=sampling, format=request.format)


def _refusal(error: ValidationError) -> RefusedRequest:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RefusedRequest(400, f"the request is not JSON: {first['msg']}")
    place = ".".join(map(str, first["loc"])) or "the request"
    return RefusedRequest(422, f"{place[:80]}: {first['msg']}")


def _check_counts(request: SampleRequest) -> None:
    count = len(request.seeds)
    if request.labels is not None and len(request.labels) != count:
        raise ValueError(f"labels: {len(request.labels)} labels do not match {count} seeds")
    if request.format == "png" and count != 1:
        raise ValueError(f"format: png has one image, and {count} seeds were given; use json")
