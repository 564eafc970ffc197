"""A slow store: moto's S3 server in a process of its own, which delays each request and counts them."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from patchloom.benchmarks.workers import free_port
from patchloom.errors import UserError

BUCKET, COUNT_PATH = "growth", "/requests-so-far"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
READY_WITHIN_S = 60.0


@dataclass(frozen=True)
class SlowStore:
    """A running store.

    Args:
        endpoint: its URL.
    """

    endpoint: str

    @property
    def address(self) -> str:
        """A bucket in it."""
        return f"s3://{BUCKET}"

    def requests(self) -> int:
        """How many requests it has answered or is answering."""
        with urllib.request.urlopen(self.endpoint + COUNT_PATH, timeout=READY_WITHIN_S) as answer:
            return int(answer.read())


@contextmanager
def slow_store(delay_s: float, cores: Iterable[int] = ()) -> Iterator[SlowStore]:
    """Start a store with an empty bucket, which this process and those that it starts use; end it after the block.

    Args:
        delay_s: seconds to wait before each request is answered.
        cores: the cores that it may use. Default: all.

    Raises:
        UserError: moto is not installed.
    """
    if importlib.util.find_spec("moto") is None:
        raise UserError('this benchmark needs a store, and moto is not installed: pip install "moto[server]"')
    store = SlowStore(f"http://127.0.0.1:{free_port()}")
    command = [sys.executable, "-m", "patchloom.benchmarks.slow_store", store.endpoint.rpartition(":")[2], str(delay_s)]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            if cores and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(server.pid, cores)
            _make_bucket(store, server)
            with _environment(AWS_ENDPOINT_URL=store.endpoint, **CREDENTIALS):
                yield store
        finally:
            server.kill()
            server.wait()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables during a block."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            os.environ.update({} if value is None else {name: value})


def _make_bucket(store: SlowStore, server: "subprocess.Popen[bytes]") -> None:
    """Make the bucket as soon as the store answers."""
    deadline = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            request = urllib.request.Request(f"{store.endpoint}/{BUCKET}", method="PUT")
            urllib.request.urlopen(request, timeout=READY_WITHIN_S).close()
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class DelayedRequests:
    """A WSGI application that delays and counts the requests of another one.

    Args:
        application: the other one.
        delay_s: seconds before each request.
    """

    def __init__(self, application: Any, delay_s: float) -> None:
        self.application, self.delay_s = application, delay_s
        self._count, self._mutex = 0, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Answer a request, or say how many there were."""
        if environ["PATH_INFO"] == COUNT_PATH:
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [str(self._count).encode()]
        with self._mutex:
            self._count += 1
        time.sleep(self.delay_s)
        return self.application(environ, start_response)


def main() -> None:
    """Serve until the process is killed: `python -m patchloom.benchmarks.slow_store PORT DELAY_S`."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    port, delay_s = int(sys.argv[1]), float(sys.argv[2])
    store = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", port, DelayedRequests(store, delay_s), threaded=True)


if __name__ == "__main__":
    main()
