"""The lock has every package with a checksum, and agrees with the constraints; an audit without a network says so."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def locked() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    return {match[1]: match[2] for match in found if match}


def test_lock_agrees_with_the_constraints() -> None:
    lock = locked()
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            assert lock[name].partition("+")[0] == version, name


def test_lock_has_what_its_packages_need() -> None:
    lock = locked()
    for name in lock:
        try:
            needed = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # of another platform or extra
            continue
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                wanted = re.sub(r"[-_.]+", "-", requirement.name).lower()
                assert wanted in lock, f"{name} needs {wanted}"


def test_verdict_of_an_audit_counts_what_was_not_checked() -> None:
    spec = importlib.util.spec_from_file_location("lock", ROOT / "deploy" / "lock.py")
    assert spec and spec.loader
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    good, unknown = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}
    bad = {"name": "c", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    message, code = lock.verdict([good, unknown])
    assert code == 0 and "1 of 2 packages" in message and "1 packages were not checked" in message
    message, code = lock.verdict([good, bad])
    assert code == 1 and "c 2: CVE-1, fixed in 3" in message


@pytest.mark.slow
def test_audit_without_a_network_says_so() -> None:
    environment = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": "/dev/null",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / "lock.py"), "audit"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0 and "nothing was checked" in done.stdout, done.stdout + done.stderr
