"""Node: what a machine has installed. Also a script without dependencies that a cluster runs to answer this."""

import hashlib
import importlib.util
import json
import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

MARK = "patchloom-node: "  # before the answer in the log of the job


def installed_versions(names: list[str]) -> dict[str, str | None]:
    """The versions of packages; None for those that are not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def code_digest(package: str | os.PathLike[str]) -> str:
    """The sha256 of all Python files of a package: names and contents, in sorted order.

    Args:
        package: its folder. Sub-packages can be links.
    """
    digest = hashlib.sha256()
    files = [Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names]
    for path in sorted(path for path in files if path.suffix == ".py"):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def main() -> None:
    """Print, as JSON, the versions of packages, the digest of Patchloom's code, and which paths do not exist here.

    The argument is a JSON object with `packages` and `paths`.
    """
    asked = json.loads(sys.argv[1])
    spec = importlib.util.find_spec("patchloom")
    places = list(spec.submodule_search_locations or []) if spec else []
    answer = {
        "digest": code_digest(places[0]) if places else None,
        "versions": installed_versions(asked["packages"]),
        "python": ".".join(map(str, sys.version_info[:3])),
        "host": socket.gethostname(),
        "missing": [path for path in asked["paths"] if not Path(path).exists()],
        "tracking_uri": bool(os.environ.get("MLFLOW_TRACKING_URI")),
    }
    print(MARK + json.dumps(answer))


if __name__ == "__main__":
    main()
