"""The job server of a Ray cluster: submits commands as jobs, follows their logs and stops them."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from patchloom.errors import UserError
from patchloom.platform.compute.answering import ask_job_server, ask_ray, check_answer, split_place
from patchloom.platform.compute.session import quiet_environment

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
REQUEST_TIMEOUT_S = 30.0
POLL_EVERY_S = 0.5
RECONNECT_EVERY_S = 3.0
SERVER_LOST_S = 600.0  # how long a job is followed without an answer of the server


class JobState(StrEnum):
    """The states of Ray's jobs."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    @property
    def is_over(self) -> bool:
        """Whether the job will not run any more."""
        return self not in (JobState.PENDING, JobState.RUNNING)


@dataclass(frozen=True)
class JobOrder:
    """What a job runs.

    Args:
        entrypoint: a line of the shell.
        folder: its working directory, copied to every node that runs a part of the job.
        environment: variables of all processes of the job. Ray shows them in its dashboard.
        labels: what is stored with the job.
        name: the id of the job; Ray chooses one by default.
    """

    entrypoint: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    name: str | None = None


@dataclass(frozen=True)
class JobReport:
    """What the server knows about a job. Times are Unix times in seconds."""

    name: str
    state: JobState
    entrypoint: str
    exit_code: int | None
    message: str
    labels: dict[str, str]
    started: float | None
    ended: float | None


class JobServer:
    """The job server at an address.

    Args:
        address: http://HOST:PORT of the dashboard. By default RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else port 8265
            of this machine.

    Raises:
        UserError: no job server answers there, or it does not accept the token of this process.
    """

    def __init__(self, address: str | None = None) -> None:
        quiet_environment()
        self.address = job_server_address(address)
        check_answer(ask_job_server(self.address), self.address, "or give another --address")
        self._client = _client(self.address)

    def submit(self, order: JobOrder) -> str:
        """Start a job; returns its id."""
        given: Any = self._client.submit_job(
            entrypoint=order.entrypoint, submission_id=order.name, metadata=order.labels,
            runtime_env={"working_dir": str(order.folder), "env_vars": order.environment},
        )  # fmt: skip
        return str(given)

    def report(self, name: str) -> JobReport:
        """The state of a job; raises UserError if the cluster does not know it."""
        try:
            return _report(self._client.get_job_info(name))
        except RuntimeError as error:
            if "404" in str(error):
                raise UserError(
                    f"{name}: {self.address} has no such job: `patchloom launch status` lists them"
                ) from None
            raise

    def reports(self) -> list[JobReport]:
        """All jobs that were submitted, the oldest first."""
        found = [_report(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(found, key=lambda job: job.started or time.time())

    def logs(self, name: str) -> str:
        """What a job has printed so far."""
        return str(self._client.get_job_logs(name))

    def stop(self, name: str) -> bool:
        """Send SIGTERM to a job; returns False if it was not running."""
        return bool(self._client.stop_job(name))

    def wait(self, name: str, timeout_s: float) -> JobReport:
        """Wait until a job is over, or until the time is; returns its last state."""
        until = time.monotonic() + timeout_s
        while not (report := self.report(name)).state.is_over and time.monotonic() < until:
            time.sleep(POLL_EVERY_S)
        return report

    def follow(self, name: str) -> Iterator[str]:
        """What a job prints, until it is over. Continues after the server or the connection was lost.

        Raises:
            UserError: the server does not answer for ten minutes.
        """
        seen, lost_at = 0, None
        while True:
            try:
                for text in self._tail(name, seen):
                    seen, lost_at = seen + len(text), None
                    yield text
                if self.report(name).state.is_over:
                    yield self.logs(name)[seen:]
                    return
            except _connection_errors():
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > SERVER_LOST_S:
                    raise UserError(
                        f"{self.address} does not answer any more; the job {name} may be running: "
                        f"`patchloom launch logs {name} --follow` follows it again"
                    ) from None
                time.sleep(RECONNECT_EVERY_S)

    def _tail(self, name: str, skip: int) -> Iterator[str]:
        """The log from a character on, as it grows, until the job is over. The last part can be missing."""
        pieces: AsyncIterator[str] = self._client.tail_job_logs(name)
        with asyncio.Runner() as runner:
            coming = runner.get_loop().create_task(_next(pieces))
            while True:
                runner.run(_wait_for(coming))
                if not coming.done():  # Ray notices the end of a job seconds later
                    if self.report(name).state.is_over:
                        return
                    continue
                text = coming.result()
                if text is None:
                    return
                coming = runner.get_loop().create_task(_next(pieces))
                new, skip = text[skip:], max(0, skip - len(text))
                if new:
                    yield new


async def _next(pieces: AsyncIterator[str]) -> str | None:
    return await anext(pieces, None)


async def _wait_for(task: "asyncio.Task[str | None]") -> None:
    await asyncio.wait({task}, timeout=POLL_EVERY_S)


def job_server_address(given: str | None) -> str:
    """The URL of the job server.

    Args:
        given: an address of the user: http://HOST:PORT, HOST:PORT of a dashboard, or None.

    Raises:
        UserError: it is an address of another kind.
    """
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or DEFAULT_ADDRESS
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or address in ("auto", "local"):
        raise UserError(f"{address} is not the address of a job server: give --address http://HOST:8265")
    place = parts.netloc.rpartition("@")[2]
    host, port = split_place(place)
    if not host:
        raise UserError(f"{address}: {place!r} is not HOST:PORT: give --address http://HOST:8265")
    if not given and "://" not in address and host and port and ask_ray(host, port).name != "FOREIGN":
        raise UserError(f"RAY_ADDRESS={address} is no job server: give --address http://{host}:8265 (the dashboard)")
    return url.rstrip("/")


def _client(address: str) -> Any:
    """Ray's client, with a limit on the time of each request."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            return super()._do_request(*arguments, **{"timeout": REQUEST_TIMEOUT_S, **options})

    for name in (
        "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)
    # Ray prefers these variables to the argument
    kept = {name: os.environ.pop(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS") if name in os.environ}
    try:
        return Client(address)
    finally:
        os.environ.update(kept)


def _connection_errors() -> tuple[type[Exception], ...]:
    import aiohttp
    import requests

    # a request that a restarting server refuses is a RuntimeError
    return (aiohttp.ClientError, requests.RequestException, OSError, RuntimeError)


def _report(details: Any) -> JobReport:
    return JobReport(
        details.submission_id, JobState(details.status.value), details.entrypoint, details.driver_exit_code,
        details.message or "", details.metadata or {}, _seconds(details.start_time), _seconds(details.end_time),
    )  # fmt: skip


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
