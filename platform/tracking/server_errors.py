"""Errors of MLflow's server: what an HTTP error means, in one line with advice."""

import re
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import urlsplit

from patchloom.platform.tracking.store import tracking_uri
from patchloom.redaction import redacted

STATUS = re.compile(r"failed with error code (\d+)|too many (\d+) error responses")
NO_JSON = "not in a valid JSON format"  # MLflow's words for a page that is not of its API
WRONG_HOST = "Invalid Host header"  # the answer of `mlflow server` to a host name that it was not started for


def problem_of_server(error: BaseException, store: str | None = None) -> str | None:
    """What went wrong between MLflow and its server, and what to do, in one line.

    Args:
        error: an exception of MLflow.
        store: the address of the store that was asked, by default the one of the runs.

    Returns:
        None if the error is not about the server's answers.
    """
    address = store or tracking_uri()
    if not address.startswith(("http://", "https://")):
        return None
    uri, said = f"MLflow at {redacted(address)}", first_line(error)
    if any(type(found).__name__ == "SSLError" for found in _chain(error)):
        return (
            f"{uri} has a certificate that is not trusted here ({said}): set MLFLOW_TRACKING_SERVER_CERT_PATH to the "
            "file of its authority, or check that the address is https"
        )
    status = _status(error)
    if status is None:
        return f"{uri} does not answer ({said}): start it again" if is_of_connection(error) else None
    if status == HTTPStatus.UNAUTHORIZED:
        return (
            f"{uri} wants a login: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if status == HTTPStatus.FORBIDDEN:
        return _forbidden(address, str(error))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return f"{uri} fails with status {status}: look at the log of the server, then try again"
    code = getattr(error, "error_code", "")
    if _is_of_api(error) and code != "ENDPOINT_NOT_FOUND":
        return f"{uri} refuses a request ({said})"
    return f"{uri}: a server answers there, but not as MLflow (status {status}): check the path in MLFLOW_TRACKING_URI"


def _forbidden(address: str, said: str) -> str:
    uri = f"MLflow at {redacted(address)}"
    if WRONG_HOST in said:
        host = urlsplit(address).hostname
        return f"{uri} was not started for the host name {host}: start it with `mlflow server --allowed-hosts {host}`"
    return (
        f"{uri} does not permit this: ask for the permission, or check MLFLOW_TRACKING_USERNAME or "
        "MLFLOW_TRACKING_TOKEN"
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status that caused an exception of MLflow; None if there was no answer."""
    for found in _chain(error):
        if type(found).__module__ != "mlflow.exceptions":
            continue
        match = STATUS.search(str(found))
        if match:
            return int(match[1] or match[2])
        if NO_JSON in str(found):
            return int(HTTPStatus.OK)
        if _is_of_api(found):
            return int(found.get_http_status_code())  # type: ignore[attr-defined]
    return None


def _is_of_api(error: BaseException) -> bool:
    """Whether a server of MLflow, not one in front of it, answered with this error."""
    return type(error).__name__ == "RestException"


def is_of_connection(error: BaseException) -> bool:
    """Whether an error of MLflow comes from the connection to its server."""
    from requests import RequestException

    return any(isinstance(found, RequestException) for found in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def first_line(error: BaseException) -> str:
    """The first line of an error's message without passwords, at most 120 characters."""
    problem = redacted(str(error).strip().split("\n")[0])
    return problem if len(problem) <= 120 else f"{problem[:117]}..."
