"""Heads of Ray clusters for tests: real ones, in processes and folders of their own, with tokens."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

TOKEN = "a-token-of-the-tests-0123456789abcdef"


@dataclass(frozen=True)
class Head:
    """The addresses of a head node: of its control service, its job server, and its Ray Client server."""

    gcs: str
    jobs: str
    client: str


def free_ports(count: int) -> list[int]:
    """Ports where nothing listens."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def ray_head(cpus: int = 2, **variables: str) -> Iterator[Head]:
    """A head node with a token, for the duration of the block. Its PATH contains this Python.

    Args:
        cpus: of the node.
        variables: further environment of the node.
    """
    gcs, dashboard, client, agent = free_ports(4)
    python = str(Path(sys.executable).parent)
    node = {
        **os.environ, "PATH": f"{python}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", **variables,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # the path of a socket is limited to 107 characters
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={gcs}",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--num-cpus={cpus}",
            f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--object-store-memory=200000000",
        ]  # fmt: skip
        with open(Path(folder) / "start.log", "w") as log:  # noqa: PTH123
            process = subprocess.Popen(command, env=node, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for_job_server(f"http://127.0.0.1:{dashboard}", process)
            yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}")
        finally:
            process.terminate()
            process.wait(60)


def _wait_for_job_server(url: str, process: "subprocess.Popen[bytes]") -> None:
    request = urllib.request.Request(f"{url}/api/version", headers={"Authorization": f"Bearer {TOKEN}"})
    for _ in range(600):
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")
