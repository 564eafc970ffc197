"""The lock: every package that was tested, also those that others need, with its sha256.

`make lock` writes `requirements.lock` from `constraints.txt` and pyproject.toml, for the Python that runs it.
`make audit` looks its packages up in the database of known vulnerabilities, with pip-audit.
"""

import json
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
NO_NETWORK = re.compile(r"connection|resolve|timed? ?out|unreachable|no matching distribution|proxy|ssl", re.IGNORECASE)


def make_lock() -> int:
    """Resolve all packages without installing them, and write the lock."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet",
                   "--disable-pip-version-check", "--report", str(report), "-c", str(ROOT / "constraints.txt"),
                   f"{ROOT}[dev,docs]"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"make lock: pip cannot resolve the packages: {last_line(done.stderr)}", file=sys.stderr)
            return 1
        LOCK.write_text(lock_of(json.loads(report.read_text())))
    print(f"make lock: {LOCK.name} has {LOCK.read_text().count('==')} packages")
    return 0


def lock_of(report: dict[str, object]) -> str:
    """The lock from a report of pip (its format 1)."""
    lines = [
        "# All packages that were tested together, with their checksums; `make lock` writes this file.",
        f"# Python {platform.python_version()} on {platform.system()} {platform.machine()}.",
        "# pip install --require-hashes -r requirements.lock && pip install --no-deps .",
        "# torch is the build for CPUs: pip needs --extra-index-url https://download.pytorch.org/whl/cpu",
    ]
    packages: dict[str, str] = {}
    for package in report["install"]:  # type: ignore[attr-defined]
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        hashes = package["download_info"].get("archive_info", {}).get("hashes", {})
        if name != "patchloom":
            packages[name] = f"{name}=={package['metadata']['version']} --hash=sha256:{hashes['sha256']}"
    return "\n".join([*lines, *(packages[name] for name in sorted(packages))]) + "\n"


def audit() -> int:
    """Look up the packages of the lock. Without a network, say so and return 0."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = str(Path(scratch) / "bin" / "python")
        install = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--retries",
            "1",
            "pip-audit",
        ]
        done = subprocess.run(install, capture_output=True, text=True)
        if not done.returncode:
            arguments = [
                "--disable-pip",
                "--require-hashes",
                "--progress-spinner",
                "off",
                "-f",
                "json",
                "-r",
                str(LOCK),
            ]
            done = subprocess.run([python, "-m", "pip_audit", *arguments], capture_output=True, text=True)
    if not done.stdout.strip():
        print(f"make audit: nothing was checked: {last_line(done.stderr)}")
        return 0 if NO_NETWORK.search(done.stderr) else 1
    message, code = verdict(json.loads(done.stdout)["dependencies"])
    print(message)
    return code


def verdict(packages: list[dict[str, object]]) -> tuple[str, int]:
    """What pip-audit found in its report, in words, and the exit code."""
    bad = [package for package in packages if package.get("vulns")]
    lines = []
    for package in bad:
        for found in package["vulns"]:  # type: ignore[attr-defined]
            fixed = ", ".join(found["fix_versions"]) or "no version"
            lines.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    skipped = sum("skip_reason" in package for package in packages)
    known = len(packages) - skipped
    lines.append(
        f"make audit: {known} of {len(packages)} packages were looked up, {len(bad)} with known vulnerabilities"
    )
    if skipped:
        lines.append(f"{skipped} packages were not checked, because the database does not have them or does not answer")
    return "\n".join(lines), 1 if bad else 0


def last_line(text: str) -> str:
    """The last line that is not empty, in at most 200 characters."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no message"])[-1][:200]


if __name__ == "__main__":
    sys.exit({"lock": make_lock, "audit": audit}[sys.argv[1]]())
