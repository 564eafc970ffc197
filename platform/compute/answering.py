"""Answering: whether a network service answers, asked with a short timeout before any work."""

import http.client
import json
import os
import socket
import ssl
import urllib.error
import urllib.request
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from patchloom.errors import UserError

CONNECT_WAIT_S = 5.0
ANSWER_WAIT_S = 10.0  # a busy server may take long
RAY_CLIENT_PORT = 10001  # of `ray://HOST`
GCS_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
TOKEN_SOURCES = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or write the token to ~/.ray/auth_token"
CLIENT_METHOD = "/ray.rpc.RayletDriver/ClusterInfo"


def accepts(host: str, port: int) -> bool:
    """Whether something listens at a port."""
    try:
        socket.create_connection((host, port), CONNECT_WAIT_S).close()
    except OSError:
        return False
    return True


def answers_http(url: str) -> bool:
    """Whether a server answers a request, with whatever status."""
    try:
        urllib.request.urlopen(url, timeout=ANSWER_WAIT_S).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # it answers; its client decides about certificates
    except (OSError, http.client.HTTPException):
        return False
    return True


class ClusterAnswer(StrEnum):
    """What is found at an address where a Ray cluster is expected."""

    READY = "a Ray cluster that accepts this process"
    REFUSED = "a Ray cluster that wants a token"
    FOREIGN = "another service"
    SILENT = "nothing"


def ask_ray(host: str, port: int, method: str = GCS_METHOD) -> ClusterAnswer:
    """Ask what answers at a port of a Ray cluster, within seconds.

    Args:
        host: name or address.
        port: of the cluster's control service, or of the Ray Client server.
        method: the gRPC method to call with an empty request. Its answer does not matter, only whether the server
            knows the method and accepts the token.
    """
    import grpc

    if not accepts(host, port):
        return ClusterAnswer.SILENT
    with grpc.insecure_channel(_place(host, port), [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            metadata = [(name.lower(), value) for name, value in token_headers().items()]
            channel.unary_unary(method)(b"", timeout=ANSWER_WAIT_S, metadata=metadata)
        except grpc.RpcError as error:
            return _meaning(error.code())
    return ClusterAnswer.READY


def _meaning(code: Any) -> ClusterAnswer:
    import grpc

    if code == grpc.StatusCode.UNAUTHENTICATED:
        return ClusterAnswer.REFUSED
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED):
        return ClusterAnswer.FOREIGN
    return ClusterAnswer.READY  # such as NOT_FOUND from a Ray Client server, which wants a client's number


def ask_job_server(url: str) -> ClusterAnswer:
    """Ask what answers at the address of a cluster's dashboard, which is its job server, within seconds."""
    request = urllib.request.Request(f"{url.rstrip('/')}/api/version", headers=token_headers())
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_WAIT_S) as response:
            return ClusterAnswer.READY if "ray_version" in json.load(response) else ClusterAnswer.FOREIGN
    except urllib.error.HTTPError as error:
        is_ray = error.code in (401, 403) and b"authentication token" in error.read()
        return ClusterAnswer.REFUSED if is_ray else ClusterAnswer.FOREIGN
    except urllib.error.URLError as error:
        return ClusterAnswer.FOREIGN if isinstance(error.reason, ssl.SSLError) else ClusterAnswer.SILENT
    except (OSError, http.client.HTTPException, ValueError):
        parts = urlsplit(url)
        is_open = accepts(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        return ClusterAnswer.FOREIGN if is_open else ClusterAnswer.SILENT


def token_headers() -> dict[str, str]:
    """The headers that prove this process to a cluster with tokens. Empty unless RAY_AUTH_MODE is `token`."""
    if not _sends_token():
        return {}
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # compiled

    loader = AuthenticationTokenLoader.instance()
    try:
        return dict(loader.get_token_for_http_header()) if loader.has_token(ignore_auth_mode=True) else {}
    except Exception as error:  # of Ray, such as for a file that does not exist
        raise UserError(f"Ray cannot read its token ({str(error).strip().splitlines()[0]}): {TOKEN_SOURCES}") from None


def _sends_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def check_ray_address() -> None:
    """Raise UserError if no cluster at RAY_ADDRESS accepts this process. Ray itself would try for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    scheme, _, place = address.rpartition("://")
    if scheme in ("http", "https"):
        raise UserError(
            f"RAY_ADDRESS={address} is the address of a job server: run `patchloom launch COMMAND...`, or set "
            "RAY_ADDRESS to HOST:6379"
        )
    if address in ("", "auto", "local") or scheme not in ("", "ray"):
        return
    host, port = split_place(place, RAY_CLIENT_PORT if scheme else None)
    if not host or port is None:
        raise UserError(f"RAY_ADDRESS={address} is not HOST:PORT or ray://HOST:PORT: correct it, or unset it")
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        found = ClusterAnswer.READY if accepts(host, port) else ClusterAnswer.SILENT
    else:
        found = ask_ray(host, port, CLIENT_METHOD if scheme else GCS_METHOD)
    check_answer(found, f"RAY_ADDRESS={address}", "or unset RAY_ADDRESS to run on this machine")


def split_place(place: str, default_port: int | None = None) -> tuple[str | None, int | None]:
    """The host and the port of `HOST:PORT`; None for what is missing or malformed."""
    try:
        parts = urlsplit(f"//{place}")
        return parts.hostname, parts.port or default_port
    except ValueError:
        return None, None


def check_answer(found: ClusterAnswer, address: str, otherwise: str) -> None:
    """Raise UserError unless a cluster accepts this process.

    Args:
        found: what was found at the address.
        address: the address, as the user gave it.
        otherwise: the end of the advice if no cluster is there.
    """
    if found == ClusterAnswer.SILENT:
        raise UserError(f"{address}: nothing answers there: start the cluster, correct the address, {otherwise}")
    if found == ClusterAnswer.FOREIGN:
        raise UserError(
            f"{address}: a service answers there that is not a Ray cluster: correct the address and port, {otherwise}"
        )
    if found == ClusterAnswer.REFUSED:
        raise UserError(f"{address}: the Ray cluster wants {_token_advice()}")


def _token_advice() -> str:
    if not _sends_token():
        return f"a token, and RAY_AUTH_MODE is not `token`, so none was sent: set it, and {TOKEN_SOURCES}"
    if not token_headers():
        return f"a token, and there is none here: {TOKEN_SOURCES}"
    return f"another token than {_token_source()}: correct it; `ray get-auth-token` on the head node prints it"


def _token_source() -> str:
    """Where Ray finds the token, in the order in which it looks."""
    names = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    return f"that of {names[0]}" if names else "that in ~/.ray/auth_token"


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
