"""Settings: which environment variables of this shell a job gets. Secrets never travel: Ray shows all that do."""

import os
import re
from urllib.parse import urlsplit

from patchloom.errors import UserError

# what says where things are; PATCHLOOM_* travels too
TRAVELLING = (
    "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_S3_ENDPOINT_URL",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "HF_ENDPOINT",
)  # fmt: skip
OF_THIS_MACHINE = ("PATCHLOOM_CACHE", "PATCHLOOM_CACHE_GIB")
SECRET = re.compile("SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|KEY", re.IGNORECASE)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def travelling_settings(names: list[str], is_this_machine: bool) -> dict[str, str]:
    """The variables of this shell that a job gets.

    Args:
        names: further names, of --env.
        is_this_machine: the cluster is asked at an address of this machine.

    Raises:
        UserError: a variable is a secret, is not set, or names an address that only this machine has.
    """
    own = [name for name in os.environ if name.startswith("PATCHLOOM_") and name not in OF_THIS_MACHINE]
    settings = {name: os.environ[name] for name in (*TRAVELLING, *own) if os.environ.get(name)}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        if not _is_server(settings.get(name, "")):
            settings.pop(name, None)  # a file of this machine
    for name in names:
        if name not in os.environ:
            raise UserError(f"--env {name}: this variable is not set here")
        settings[name] = os.environ[name]
    for name, value in settings.items():
        _check_setting(name, value, is_this_machine)
    return settings


def _check_setting(name: str, value: str, is_this_machine: bool) -> None:
    by_reference = "set it on the nodes, or write it to a file there and name the file with --env-file"
    if SECRET.search(name):
        raise UserError(f"{name} looks like a secret, and Ray's dashboard shows what a job gets: {by_reference}")
    parts = urlsplit(value) if "://" in value else None
    if parts and parts.password:
        raise UserError(f"{name} contains a password, and Ray's dashboard shows what a job gets: {by_reference}")
    if parts and parts.hostname in LOOPBACK and not is_this_machine:
        raise UserError(f"{name}={value} is an address of this machine: set it to an address that the nodes can reach")


def _is_server(uri: str) -> bool:
    return "://" in uri and not uri.startswith(("sqlite", "file"))
