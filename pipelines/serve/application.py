"""The Ray Serve application: replicas that load one model and sample the requests that wait together."""

import asyncio
import base64
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.models.backbones import allow_backbones
from patchloom.models.generate import Sampling
from patchloom.pipelines.pages.pictures import png_bytes
from patchloom.pipelines.sample.options import DEFAULT_BATCH
from patchloom.pipelines.sample.request_limits import Deadline, RequestTooSlow
from patchloom.pipelines.sample.sampler import load_for_sampling, sample_classes
from patchloom.pipelines.serve.requests import CheckedRequest, RefusedRequest, ServerLimits, checked_request
from patchloom.platform.tracking.registry import fetch_model, resolved_reference
from patchloom.platform.tracking.store import store_environment

try:
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
except ImportError as error:
    raise UserError(f"Ray Serve is not installed ({error}): pip install 'patchloom[serve]'") from None

if TYPE_CHECKING:
    from ray.serve import Application

BATCH_IMAGES_HEADER = "x-batch-images"  # how many images were sampled together


class ServeArguments(ServerLimits):
    """The arguments of `app`, as `serve run` and a Serve config file give them."""

    model: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/model or a folder")
    batch: int = Field(
        DEFAULT_BATCH, ge=1, description="images per network batch; the bytes of the images depend on it"
    )
    max_batch_images: int = Field(32, ge=1, description="images of waiting requests that are sampled together")
    batch_wait_s: float = Field(0.05, ge=0, description="seconds that a request waits for others")
    max_queued_requests: int = Field(64, ge=1, description="requests that may wait; more are answered with 503")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, ge=0, description="CPUs per replica")
    num_gpus: float = Field(0, ge=0, description="GPUs per replica")
    allow_backbone: str | None = Field(None, description="packages of networks, separated by commas")

    def limits(self) -> ServerLimits:
        """The bounds of a request."""
        given = {name: getattr(self, name) for name in ServerLimits.model_fields}
        return ServerLimits(**given | {"max_batch": max(self.max_batch, self.batch)})


@dataclass(frozen=True)
class _Waiting:
    """A request that waits for a batch, and when it is given up."""

    request: CheckedRequest
    deadline: Deadline


@dataclass(frozen=True)
class _Answer:
    """The images of one request, (N, C, H, W) uint8, and how many images were sampled together."""

    images: np.ndarray
    batch_images: int


class ModelServer:
    """One replica: it loads the model once, and answers `POST /sample`, `GET /model` and `GET /health`."""

    def __init__(self, arguments: ServeArguments, stores: dict[str, str]) -> None:
        os.environ.update(stores)  # the replica may have another working directory
        allow_backbones(*(arguments.allow_backbone or "").split(",") if arguments.allow_backbone else ())
        self.arguments, self.limits = arguments, arguments.limits()
        self.fetched = fetch_model(arguments.model)
        self.model = load_for_sampling(self.fetched.folder)
        self._sample.set_max_batch_size(max(arguments.max_batch_images, arguments.max_images))
        self._sample.set_batch_wait_timeout_s(arguments.batch_wait_s)

    async def __call__(self, request: Request) -> Response:
        """Answer an HTTP request."""
        path = request.scope["path"].removeprefix(request.scope.get("root_path", "").rstrip("/"))
        routes: dict[str, tuple[str, Callable[[Request], Any]]] = {
            "/sample": ("POST", self._answer_sample),
            "/model": ("GET", self._answer_model),
            "/health": ("GET", self._answer_health),
        }
        try:
            if path not in routes:
                raise RefusedRequest(404, "this address does not exist: use POST /sample, GET /model or GET /health")
            method, answer = routes[path]
            if request.method != method:
                raise RefusedRequest(405, f"{path} is for {method}")
            response: Response = await answer(request)
            return response
        except RefusedRequest as refused:
            return JSONResponse({"error": refused.message}, refused.status)

    async def _answer_health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _answer_model(self, request: Request) -> Response:
        card, fetched = self.model.card, self.fetched
        return JSONResponse({
            "model": fetched.reference,
            "name": fetched.name,
            "version": fetched.version,
            "weights_sha256": card.weights_sha256,
            "kind": card.normalisation.kind,
            "resolution": card.denoiser.resolution,
            "classes": list(card.class_names),
            "options": asdict(Sampling()),
            "batch": self.arguments.batch,
            "limits": self.limits.model_dump(),
            "patchloom": __version__,
        })  # fmt: skip

    async def _answer_sample(self, request: Request) -> Response:
        limits, timeout = self.limits, self.limits.request_timeout_s
        body = await _body(request, limits.max_body_bytes)
        wanted = checked_request(body, self.model.card, limits, self.arguments.batch)
        try:
            async with asyncio.timeout(timeout):
                answer: _Answer | RefusedRequest | None = await self._sample(_Waiting(wanted, limits.deadline()))
            if answer is None:
                raise TimeoutError
        except TimeoutError:
            problem = f"no image within {timeout:g} seconds (request_timeout_s): ask for less, or try again later"
            raise RefusedRequest(503, problem) from None
        if isinstance(answer, RefusedRequest):
            raise answer
        headers = {BATCH_IMAGES_HEADER: str(answer.batch_images)}
        pngs = [png_bytes(image) for image in answer.images]
        if wanted.format == "png":
            return Response(pngs[0], media_type="image/png", headers=headers)
        rows = [
            {"seed": seed, "label": label, "png": base64.b64encode(png).decode()}
            for seed, label, png in zip(wanted.seeds, wanted.classes, pngs, strict=True)
        ]
        return JSONResponse({"model": self.fetched.reference, "images": rows}, headers=headers)

    @serve.batch(batch_size_fn=lambda waiting: sum(len(one.request.seeds) for one in waiting))  # type: ignore[untyped-decorator]
    async def _sample(self, waiting: list[_Waiting]) -> list[_Answer | RefusedRequest | None]:
        """Sample requests together; those with the same options share the network's batches."""
        return await asyncio.to_thread(self._sample_all, waiting)  # health checks are answered meanwhile

    def _sample_all(self, waiting: list[_Waiting]) -> list[_Answer | RefusedRequest | None]:
        answers: dict[int, _Answer | RefusedRequest] = {}
        alive = [number for number, one in enumerate(waiting) if one.deadline.at_s > time.monotonic()]
        for sampling in dict.fromkeys(waiting[number].request.sampling for number in alive):
            group = [number for number in alive if waiting[number].request.sampling == sampling]
            requests = [waiting[number].request for number in group]
            seeds = [seed for request in requests for seed in request.seeds]
            classes = [label for request in requests for label in request.classes]
            last = max((waiting[number].deadline for number in group), key=lambda deadline: deadline.at_s)
            try:
                images = sample_classes(self.model, seeds, classes, sampling, self.arguments.batch, last.check)
            except RequestTooSlow:
                continue
            except ValueError as error:  # the model cannot be sampled with these options: others in the batch can be
                answers.update(dict.fromkeys(group, RefusedRequest(422, str(error))))
                continue
            ends = np.cumsum([len(request.seeds) for request in requests])
            for number, part in zip(group, np.split(images, ends[:-1]), strict=True):
                answers[number] = _Answer(part, len(seeds))
        return [answers.get(number) for number in range(len(waiting))]  # nobody waits for a missing one


async def _body(request: Request, most_bytes: int) -> bytes:
    """The body of a request; raises RefusedRequest as soon as it is too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise RefusedRequest(413, f"the request has more than {most_bytes} bytes")
    return body


def app(arguments: ServeArguments) -> "Application":
    """The Ray Serve application of one model.

    An alias is resolved here, so that all replicas serve the same version. Deploy again to serve another one.

    Args:
        arguments: `model` and, if wanted, the other fields of `ServeArguments`.

    Raises:
        UserError: there is no such model.

    Example:
        serve run patchloom.pipelines.serve:app model=models:/my-model@champion max_replicas=4
    """
    fixed = arguments.model_copy(update={"model": resolved_reference(arguments.model)})
    deployment = serve.deployment(
        ModelServer,
        name="patchloom",
        ray_actor_options={"num_cpus": fixed.num_cpus, "num_gpus": fixed.num_gpus},
        autoscaling_config={
            "min_replicas": fixed.min_replicas,
            "max_replicas": max(fixed.max_replicas, fixed.min_replicas),
            "target_ongoing_requests": max(1, fixed.max_batch_images // 4),
        },
        max_ongoing_requests=fixed.max_batch_images,
        max_queued_requests=fixed.max_queued_requests,
    )
    return deployment.bind(fixed, store_environment())
