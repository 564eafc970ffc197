"""Origin: who started a run, with which command, and from which commit, as MLflow's own tags.

MLflow finds these itself only in the process that a user starts, and not in the workers of Ray.
"""

import functools
import getpass
import shlex
import subprocess
import sys
from pathlib import Path

import patchloom

COMMANDS = {"train": "train", "search": "tune", "autoencoder": "autoencoder train", "import": "models register"}
GIT_WAIT_S = 5.0


def origin_tags(kind: str) -> dict[str, str]:
    """The tags of a run of this kind that say who started it and how; what is not known is left out."""
    command = f"patchloom {COMMANDS.get(kind, kind)}"
    tags = {"mlflow.user": _user(), "mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    found = tags | {"mlflow.source.git.commit": code_commit(), "patchloom.command": command_line()}
    return {key: value for key, value in found.items() if value}


def command_line() -> str:
    """The command of `patchloom` that this process runs; empty in other programs, such as the workers of Ray."""
    program = Path(sys.argv[0])
    is_module = program.name == "__main__.py" and program.parent.name == "cli"
    return shlex.join(["patchloom", *sys.argv[1:]]) if is_module or program.name == "patchloom" else ""


@functools.cache
def code_commit() -> str:
    """The commit of the checkout that the code is in; empty for installed code."""
    folder = Path(patchloom.__file__).resolve().parent
    git = ["git", "-C", str(folder)]
    # a virtual environment can be inside the repository of another project
    is_tracked = _output([*git, "ls-files", "--error-unmatch", "__init__.py"])
    return _output([*git, "rev-parse", "HEAD"]) if is_tracked else ""


def _output(command: list[str]) -> str:
    """What a command prints; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_WAIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container can have a user without a name
        return ""
