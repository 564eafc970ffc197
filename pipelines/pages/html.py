"""HTML pages: templates that become self-contained files, with their plots and pictures inside."""

import base64
import functools
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from patchloom import __version__
from patchloom.errors import UserError
from patchloom.platform.files.inside import open_regular

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
SINGLE_SAMPLE = re.compile(r"(^|/)\d{6}/\d{6}\.png$")  # in a folder of samples
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
LINE_COLOURS = ("#b3541e", "#2f6690", "#81a4cd", "#7a9e7e", "#9b7ede")


@dataclass(frozen=True)
class Number:
    """A large number at the top of a page, with its name below."""

    name: str
    value: str


@dataclass(frozen=True)
class Fact:
    """A line at the top of a page: what something is made of, by name; `is_code` for commands and addresses."""

    name: str
    value: str
    is_code: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG file with a caption; `pixelated` enlarges it without smoothing."""

    path: Path
    caption: str
    pixelated: bool = False


@dataclass(frozen=True)
class Table:
    """A table of text; `marks_first` highlights its first row."""

    header: list[str]
    rows: list[list[str]]
    marks_first: bool = False


@functools.cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png_data"] = png_data
    return environment


def render(template: str, **values: Any) -> Markup:
    """Fill in a template of `pages/templates`; text is escaped, `Markup` (other parts, plots) is not."""
    return Markup(_environment().get_template(template).render(**values))


def is_for_pages(name: str) -> bool:
    """Whether a page may need this file of a run, search, samples or demo: not tensors, shards and single samples."""
    return name.endswith((".json", ".jsonl", ".yaml", ".png")) and SINGLE_SAMPLE.search(name) is None


def document(title: str, body: Markup) -> str:
    """A whole page: one HTML file that needs no other file."""
    return render("page.html", title=title, body=body, version=__version__)


def is_own_page(content: bytes) -> bool:
    """Whether `document` made this page."""
    return b'<p class="note">patchloom ' in content


def svg(figure: Any) -> Markup:
    """A matplotlib figure as inline SVG, the same text for the same numbers."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    return Markup(text.getvalue()[text.getvalue().index("<svg") :])


def tidy(axes: Any) -> None:
    """Remove the frame, add light grid lines, and add a legend where lines have names.

    A click on a name in the legend hides its line: the line and the name have ids that `page.js` pairs.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6eaee")
    lines = axes.get_legend_handles_labels()[0]
    if not lines:
        return
    legend = axes.legend(frameon=False, ncols=2, fontsize="small")
    panel = axes.figure.axes.index(axes)
    for number, (line, text) in enumerate(zip(lines, legend.get_texts(), strict=True)):
        if hasattr(line, "set_gid"):
            line.set_gid(f"line-{panel}-{number}")
            text.set_gid(f"name-{panel}-{number}")


def png_data(path: Path) -> str:
    """The content of a PNG file as a data URL; raises UserError for another file, which the page would publish."""
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(len(PNG_BEGIN))
        if content != PNG_BEGIN:
            raise UserError(f"{path} is not a PNG file, so it cannot be part of a page: remove it")
        content += file.read()
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
