"""What MLflow's server, or something else at its address, answers: each is one line, and none shows a password."""

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import environment

from patchloom.errors import UserError
from patchloom.platform.tracking.registry import list_versions

JSON, PAGE = "application/json", "text/html"


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers `/health` as MLflow does, and every other request with `answer`."""

    answer = (200, PAGE, "")

    def do_POST(self) -> None:
        """Read the request, and answer it."""
        self.rfile.read(int(self.headers.get("content-length") or 0))
        status, kind, body = (200, "text/plain", "OK") if self.path.endswith("/health") else self.answer
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body.encode())

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a web server that answers with `Answers.answer`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://someone:hidden@127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.mark.parametrize(
    ("status", "kind", "body", "named"),
    [
        (401, PAGE, "<html>login</html>", "MLFLOW_TRACKING_USERNAME"),
        (403, "text/plain", "Invalid Host header - possible DNS rebinding attack detected", "--allowed-hosts"),
        (403, JSON, '{"error_code": "PERMISSION_DENIED", "message": "no"}', "permission"),
        (404, PAGE, "<html>nothing</html>", "404"),
        (404, JSON, '{"error_code": "ENDPOINT_NOT_FOUND", "message": "no"}', "404"),
        (302, PAGE, "", "302"),
        (200, PAGE, "<html>sign in</html>", "MLFLOW_TRACKING_URI"),
        (400, JSON, '{"error_code": "INVALID_PARAMETER_VALUE", "message": "max_results\\nis"}', "max_results"),
        (500, "text/plain", "failed", "500"),
        (503, JSON, '{"error_code": "INTERNAL_ERROR", "message": "database"}', "503"),
    ],
)
def test_http_error_is_one_line_with_advice(status: int, kind: str, body: str, named: str, server: str) -> None:
    Answers.answer = (status, kind, body)
    with environment(MLFLOW_TRACKING_URI=server, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"), pytest.raises(UserError) as said:
        list_versions()
    message = str(said.value)
    assert named in message and "\n" not in message and "hidden" not in message
    assert server.rpartition("@")[2] in message


def test_command_prints_one_line_for_a_server_that_wants_a_login(server: str, tmp_path: Path) -> None:
    Answers.answer = (401, PAGE, "<html>login</html>")
    done = subprocess.run(
        [sys.executable, "-m", "patchloom", "models", "list"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "MLFLOW_TRACKING_URI": server}, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "hidden" not in done.stderr


@pytest.mark.slow
def test_server_that_was_started_for_another_host_name(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--port", port, "--allowed-hosts", "other.example"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as mlflow:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.1)
            with environment(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{port}"), pytest.raises(UserError) as said:
                list_versions()
        finally:
            mlflow.terminate()
    assert f"--allowed-hosts 127.0.0.1:{port}" in str(said.value)
