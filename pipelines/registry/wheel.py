"""Wheel: patchloom itself as one file that pip installs, made from the running code without a network or a build."""

import base64
import hashlib
import io
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import patchloom
from patchloom.errors import UserError

PACKAGE = Path(patchloom.__file__).parent
RECIPES, DATA = "tune_configs", (".yaml", ".json")
INFO = f"patchloom-{patchloom.__version__}.dist-info"
WHEEL_CARD = "Wheel-Version: 1.0\nGenerator: patchloom\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel_name() -> str:
    """The file's name, which pip reads the version from."""
    return f"patchloom-{patchloom.__version__}-py3-none-any.whl"


def wheel_bytes() -> bytes:
    """The wheel of the code that runs now; the same code gives the same bytes, wherever and whenever.

    Requirements and commands are those of the installation. Raises UserError where patchloom was not installed.
    """
    contents = {**_code(), **_cards()}
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in contents.items()]
    contents[f"{INFO}/RECORD"] = "\n".join([*record, f"{INFO}/RECORD,,", ""]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            member = zipfile.ZipInfo(name)  # of 1980: no clock in the bytes
            member.external_attr = 0o644 << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return buffer.getvalue()


def _code() -> dict[str, bytes]:
    """The package's files; its rooms are links in a checkout, and folders where it was installed."""
    places = sorted(path for path in PACKAGE.iterdir() if path.is_dir())
    files = sorted(path for place in (PACKAGE, *places) for path in _code_files(place))
    return {f"patchloom/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes() for path in files}


def _code_files(folder: Path) -> set[Path]:
    """Python files of a folder and those below it, and the recipes."""
    data = [path for path in folder.glob("*") if path.suffix in DATA and folder.name == RECIPES]
    return {*folder.rglob("*.py"), *folder.glob("*.typed"), *data}


def _cards() -> dict[str, bytes]:
    # a build leaves an .egg-info in the checkout, which is no installation
    installed = next((found for found in distributions(name="patchloom") if found.read_text("METADATA")), None)
    if installed is None:
        raise UserError("patchloom is not installed, so its requirements are unknown: pip install it")
    head, blank, description = (installed.read_text("METADATA") or "").partition("\n\n")
    # the version is the code's own, where an installation points to newer code
    lines = [f"Version: {patchloom.__version__}" if line.startswith("Version:") else line for line in head.splitlines()]
    licences = [line.removeprefix("License-File:").strip() for line in lines if line.startswith("License-File:")]
    cards = {
        "METADATA": "\n".join(lines) + blank + description,
        "WHEEL": WHEEL_CARD,
        "entry_points.txt": installed.read_text("entry_points.txt") or "",
        **{f"licenses/{name}": installed.read_text(f"licenses/{name}") or "" for name in licences},
    }
    return {f"{INFO}/{name}": content.encode() for name, content in cards.items()}


def _digest(content: bytes) -> str:
    """As RECORD wants it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
