"""Answering: whether a network service answers, asked with a short timeout before any work."""

import contextlib
import http.client
import os
import socket
import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from patchloom.errors import UserError

ANSWER_WAIT_S = 5.0
RAY_CLIENT_PORT = 10001  # of `ray://HOST`
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0"  # RFC 9113, section 3.4
SETTINGS_FRAME = b"\x04"


def accepts(host: str, port: int) -> bool:
    """Whether something listens at a port."""
    try:
        socket.create_connection((host, port), ANSWER_WAIT_S).close()
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


def answers_grpc(host: str, port: int) -> bool:
    """Whether a gRPC server answers. It greets with a SETTINGS frame of HTTP/2; other servers do not."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), ANSWER_WAIT_S) as connection:
        connection.sendall(HTTP2_GREETING)
        return connection.recv(9)[3:4] == SETTINGS_FRAME
    return False


def check_ray_address() -> None:
    """Raise UserError if RAY_ADDRESS names a cluster that does not answer. Ray itself would wait for minutes."""
    address = os.environ.get("RAY_ADDRESS", "")
    scheme, _, place = address.rpartition("://")
    if address in ("", "auto", "local") or scheme not in ("", "ray"):
        return
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port or (RAY_CLIENT_PORT if scheme else None)
    except ValueError:
        host, port = None, None
    if not host or port is None:
        raise UserError(f"RAY_ADDRESS={address} is not HOST:PORT or ray://HOST:PORT: correct it, or unset it")
    is_encrypted = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    if not (accepts if is_encrypted else answers_grpc)(host, port):
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: start it, or unset RAY_ADDRESS to run on this machine"
        )
