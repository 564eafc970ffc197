"""Page: the parts that self-contained HTML pages are made of."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from patchloom import __version__

COLOURS = ("#b3541e", "#2f6690", "#81a4cd", "#7a9e7e", "#9b7ede")
STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --wash: #f5f7f9; --accent: #b3541e; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .4rem 0 .9rem; max-width: 46rem; }
.lead, figcaption, .note { color: var(--soft); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.numbers div { background: var(--wash); border-radius: .5rem; padding: .7rem .9rem; }
.numbers b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.numbers span { color: var(--soft); font-size: .85rem; }
figure { margin: 0 0 1.25rem; }
figure img, figure svg { max-width: 100%; height: auto; display: block; }
figure img.pixels { image-rendering: pixelated; }
figcaption { font-size: .88rem; margin-top: .35rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem .4rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
tr.best td { font-weight: 600; color: var(--accent); }
.looks { display: none; }
.point:hover .looks { display: block; }
.point circle, .point rect { cursor: default; }
pre { background: var(--wash); border-radius: .5rem; padding: .9rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page under a title."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(sections)
        + f'\n<p class="note">patchloom {__version__}</p>\n</body></html>\n'
    )


def svg(figure: Any) -> str:
    """A matplotlib figure as inline SVG, the same for the same numbers."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def tidy(axes: Any) -> None:
    """Few lines, and a legend where there is something to tell apart."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6eaee")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, ncols=2, fontsize="small")


def png_data(path: Path) -> str:
    """A PNG file as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def numbers(*pairs: tuple[str, str]) -> str:
    """What is read first: (name, value) pairs, large."""
    cells = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for name, value in pairs)
    return f'<div class="numbers">{cells}</div>'


def picture(path: Path, caption: str, pixels: bool = False) -> str:
    """A PNG inside the page, nothing where there is none; `pixels`: enlarged without smoothing."""
    if not path.is_file():
        return ""
    style = ' class="pixels"' if pixels else ""
    text = html.escape(caption)
    return f'<figure><img{style} alt="{text}" src="{png_data(path)}"><figcaption>{text}</figcaption></figure>'


def table(header: list[str], rows: list[list[str]], best: bool = True) -> str:
    """A table of words; with `best`, its first row stands out."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for index, row in enumerate(rows):
        mark = ' class="best"' if best and index == 0 else ""
        body += f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
