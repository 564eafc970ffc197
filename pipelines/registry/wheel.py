"""Wheel: the running code of Patchloom as one file for pip, made without a network and without a build."""

import base64
import hashlib
import io
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import patchloom
from patchloom.errors import UserError

PACKAGE = Path(patchloom.__file__).parent
RECIPES, RECIPE_SUFFIXES = "tune_configs", (".yaml", ".json")
TEMPLATE_FOLDER = "templates"
DIST_INFO = f"patchloom-{patchloom.__version__}.dist-info"
WHEEL_FILE = "Wheel-Version: 1.0\nGenerator: patchloom\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel_name() -> str:
    """The name of the wheel; pip reads the version from it."""
    return f"patchloom-{patchloom.__version__}-py3-none-any.whl"


def wheel_bytes() -> bytes:
    """The wheel of the running code. The same code gives the same bytes on any machine at any time.

    Requirements and console scripts come from the installation. Raises UserError if Patchloom is not installed.
    """
    contents = {**_code(), **_dist_info()}
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in contents.items()]
    contents[f"{DIST_INFO}/RECORD"] = "\n".join([*record, f"{DIST_INFO}/RECORD,,", ""]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            member = zipfile.ZipInfo(name)  # dated 1980, so that the bytes do not depend on the time
            member.external_attr = 0o644 << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, content)
    return buffer.getvalue()


def _code() -> dict[str, bytes]:
    """The files of the package. Its sub-packages are links in a checkout, and folders in an installation."""
    folders = sorted(path for path in PACKAGE.iterdir() if path.is_dir())
    files = sorted(path for folder in (PACKAGE, *folders) for path in _code_files(folder))
    return {f"patchloom/{path.relative_to(PACKAGE).as_posix()}": path.read_bytes() for path in files}


def _code_files(folder: Path) -> set[Path]:
    """Python files in a folder and below it, `py.typed`, the templates of pages, and the recipes."""
    data = [path for path in folder.glob("*") if path.suffix in RECIPE_SUFFIXES and folder.name == RECIPES]
    return {*folder.rglob("*.py"), *folder.glob("*.typed"), *folder.rglob(f"{TEMPLATE_FOLDER}/*"), *data}


def _dist_info() -> dict[str, bytes]:
    # a build leaves an .egg-info without METADATA in the checkout
    installed = next((found for found in distributions(name="patchloom") if found.read_text("METADATA")), None)
    if installed is None:
        raise UserError("patchloom is not installed, so its requirements are unknown: install it with pip")
    head, blank, description = (installed.read_text("METADATA") or "").partition("\n\n")
    # an editable installation can have the version of older code
    lines = [f"Version: {patchloom.__version__}" if line.startswith("Version:") else line for line in head.splitlines()]
    licenses = [line.removeprefix("License-File:").strip() for line in lines if line.startswith("License-File:")]
    files = {
        "METADATA": "\n".join(lines) + blank + description,
        "WHEEL": WHEEL_FILE,
        "entry_points.txt": installed.read_text("entry_points.txt") or "",
        **{f"licenses/{name}": installed.read_text(f"licenses/{name}") or "" for name in licenses},
    }
    return {f"{DIST_INFO}/{name}": content.encode() for name, content in files.items()}


def _digest(content: bytes) -> str:
    """The sha256 in the form that RECORD has it."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
