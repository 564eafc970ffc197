"""HTML pages: templates that become self-contained files, with their plots and pictures inside."""

import base64
import functools
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
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
POINTS_PER_INCH = 72
LINE_COLOURS = ("#b3541e", "#2f6690", "#81a4cd", "#7a9e7e", "#9b7ede")


@dataclass(frozen=True)
class Number:
    """A large number at the top of a page, with its name below, and what it means where the name does not say it."""

    name: str
    value: str
    meaning: str = ""


@dataclass(frozen=True)
class Fact:
    """A line at the top of a page: what something is made of, by name.

    Args:
        name: what it is.
        value: the text.
        is_code: for commands and addresses.
        link: a web page that it leads to, if there is one.
    """

    name: str
    value: str
    is_code: bool = False
    link: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG file with a caption.

    Args:
        path: the file.
        caption: what it shows.
        pixelated: enlarge it without smoothing.
        command: the command that makes it again; empty where that is not known.
    """

    path: Path
    caption: str
    pixelated: bool = False
    command: str = ""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Args:
        header: the titles of the columns.
        rows: the cells of each row.
        marks_first: highlight the first row.
        trials: the names of the trials of each row, which the plot of trials filters; empty for other tables.
    """

    header: list[str]
    rows: list[list[str]]
    marks_first: bool = False
    trials: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Panel:
    """A panel of a plot, as `plots.js` needs it to zoom and to show values.

    Args:
        box: left, top, right and bottom of its axes, in units of the SVG.
        x: the values at the left and at the right.
        y: the values at the bottom and at the top.
        logs: the axes that are logarithmic: "", "x", "y" or "xy".
        x_name: the title of the x axis.
        y_name: the title of the y axis.
        lines: the names of its lines by their ids; empty if values are not shown.
    """

    box: tuple[float, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    logs: str = ""
    x_name: str = ""
    y_name: str = ""
    lines: dict[str, str] = field(default_factory=dict)


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
    """A matplotlib figure as inline SVG, the same text for the same numbers.

    `plots.js` zooms into its panels and shows the values of its lines; the attribute `data-panels` describes them.
    """
    from matplotlib import rc_context

    names = [_mark_panel(axes, panel) for panel, axes in enumerate(figure.axes)]
    text = io.StringIO()
    # ids of clip paths differ between plots: a browser may not find the first of two equal ones in a closed part
    salt = repr([(axes.get_ylabel(), axes.get_xlim(), axes.get_ylim()) for axes in figure.axes])
    with rc_context({"path.simplify": False, "svg.hashsalt": salt}):  # every point has its value
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    panels = [_panel(axes, lines) for axes, lines in zip(figure.axes, names, strict=True)]
    drawn = text.getvalue()[text.getvalue().index("<svg") :]
    return Markup("<svg {}").format(panels_attribute(panels)) + Markup(drawn.removeprefix("<svg"))


def panels_attribute(panels: Sequence[Panel]) -> Markup:
    """The attribute of an SVG that describes its panels to `plots.js`."""
    return Markup('data-panels="{}"').format(json.dumps([asdict(panel) for panel in panels]))


def _mark_panel(axes: Any, panel: int) -> dict[str, str]:
    """Give the parts of a panel the ids that `plots.js` looks for; returns the names of its lines by id."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set_gid("ytick_offset")  # is hidden with the ticks
    handles, titles = axes.get_legend_handles_labels()
    named = {id(_line_of(handle)): title for handle, title in zip(handles, titles, strict=True)}
    lines = {}
    for number, line in enumerate(axes.get_lines()):
        if line.get_transform() == axes.transData and line.get_gid() is None:
            line.set_gid(f"line-{panel}-other-{number}")
        lines[line.get_gid()] = named.get(id(line), "")
    return {gid: name for gid, name in lines.items() if gid is not None and gid.startswith("line-")}


def _line_of(handle: Any) -> Any:
    """The line of an entry of a legend: itself, or that of a line with error bars."""
    return handle.lines[0] if hasattr(handle, "lines") else handle


def _panel(axes: Any, lines: dict[str, str]) -> Panel:
    """A panel of a figure that was drawn; its sides are in points, as in the SVG."""
    place, (width, height) = axes.get_position(), axes.figure.get_size_inches() * POINTS_PER_INCH
    box = (place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height)
    return Panel(
        box=tuple(round(float(side), 3) for side in box),
        x=tuple(map(float, axes.get_xlim())),
        y=tuple(map(float, axes.get_ylim())),
        logs="".join(name for name in "xy" if getattr(axes, f"get_{name}scale")() == "log"),
        x_name=axes.get_xlabel(),
        y_name=axes.get_ylabel(),
        lines=lines,
    )


def tidy(axes: Any) -> None:
    """Remove the frame, add light grid lines, and add a legend where lines have names.

    A click on a name in the legend hides its line: the line and the name have ids that `page.js` pairs. Error bars of a
    line have the id `part-...`.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6eaee")
    axes.yaxis.labelpad = 10  # a zoom has longer numbers than the whole plot
    handles = axes.get_legend_handles_labels()[0]
    if not handles:
        return
    legend = axes.legend(frameon=False, ncols=2, fontsize="small")
    panel = axes.figure.axes.index(axes)
    for number, (handle, text) in enumerate(zip(handles, legend.get_texts(), strict=True)):
        for part in handle.get_children() if hasattr(handle, "get_children") else []:
            part.set_gid(f"part-{panel}-{number}")
        line = _line_of(handle)
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
