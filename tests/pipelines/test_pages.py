"""Pages in a real browser: every kind loads without errors, shows its pictures, and fits wide and narrow windows."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import Browser, Look
from search_folders import write_search_folder

from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.inspect import dataset_sheet
from patchloom.pipelines.pages.html import Number, Picture, Table, document, render, svg, tidy
from patchloom.pipelines.report import report
from patchloom.pipelines.reproduce.outcome import Finding, Outcome
from patchloom.pipelines.sample import sample
from patchloom.pipelines.tune.page import search_section
from patchloom.platform.dataset import open_dataset
from patchloom.platform.files.storage import make_folder
from patchloom.platform.records.demo import DEMO_FILE, DemoCard
from patchloom.platform.records.run import ProgressLine, RunCard, write_progress

pytestmark = pytest.mark.pages

WIDTHS = (1280, 400)
LEAST_SCALE = 0.7  # pixels per point: text of 10 points has 7 pixels
LONG = "a/name/without/spaces/" * 8
COMMAND = (
    "patchloom train demo_pixels --data a-dataset-with-a-long-name --out run --set patches.p=0.25 --workers 2 --seed 3"
)


@pytest.fixture(scope="module")
def samples(trained: Path, pixels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples of the tiny run, measured."""
    folder = tmp_path_factory.mktemp("pages") / "samples"
    sample(str(trained), str(folder), "0-5", steps=2, workers=0)
    evaluate(str(folder), str(pixels), features="colours", workers=0)
    return folder


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_search_folder(tmp_path_factory.mktemp("pages") / "search")


@pytest.fixture(scope="module")
def make_page(
    trained: Path, pixels: Path, samples: Path, search: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Makes a page of each kind."""
    folder = tmp_path_factory.mktemp("made")

    def unmeasured() -> Path:
        place = shutil.copytree(samples, folder / "unmeasured", ignore=shutil.ignore_patterns("metrics*"))
        return report(str(place), str(folder / "unmeasured.html"))

    def started() -> Path:
        place = shutil.copytree(trained, folder / LONG.replace("/", "-"))
        (place / "progress.jsonl").unlink()
        return report(str(place), str(folder / "started.html"))

    def autoencoder() -> Path:
        place = make_folder(folder / "autoencoder")
        card = RunCard(kind="autoencoder", dataset=LONG, dataset_fingerprint="a" * 64, command=COMMAND)
        (place / "run.json").write_text(card.to_json())
        write_progress(
            place, [ProgressLine(step=n, images_seen=8 * n, loss=1 / n, images_per_second=5) for n in (1, 2)]
        )
        return report(str(place), str(folder / "autoencoder.html"))

    def demo() -> Path:
        place = folder / "demo"
        for name, source in {"run": trained, "pixels": pixels, "samples": samples, "search": search}.items():
            shutil.copytree(source, place / name)
        dataset_sheet(open_dataset(pixels), place / "dataset.png")
        card = DemoCard(chain="tiny", commands=[COMMAND] * 3, model="models:/tiny/1", tracking_uri=f"sqlite:///{LONG}")
        (place / DEMO_FILE).write_text(card.to_json())
        return report(str(place), str(folder / "demo.html"))

    def reproduction() -> Path:
        header = ["system", "FID of the paper", "held-out loss", "FID here", "relative FLOPs", "time of the paper"]
        finding = Finding("Cats", Table(header, [["PDM-DDPM++", "3.11", "0.4 ± 0.1", "", "0.5", "about 9 h"]]), [LONG])
        outcome = Outcome(
            lead="A table of the paper.",
            numbers=[Number("schedule", "progressive"), Number("counted images", "1,234,567,890")],
            findings=[finding],
            texts=["A sentence."],
            differences=[LONG],
            pictures=[Picture(samples / "contact_sheet.png", "Samples.")],
            details=[("The search", search_section(search))],
        )
        page = folder / "reproduction.html"
        origin = "two cores, patchloom 0.2.0"
        page.write_text(document("Table 4 of Patch Diffusion", outcome.section([COMMAND], COMMAND, origin)))
        return page

    makers = {
        "run": lambda: report(str(trained), str(folder / "run.html")),
        "started run": started,
        "autoencoder": autoencoder,
        "samples": lambda: report(str(samples), str(folder / "samples.html")),
        "unmeasured samples": unmeasured,
        "search": lambda: report(str(search), str(folder / "search.html")),
        "demo": demo,
        "reproduction": reproduction,
    }
    return lambda kind: makers[kind]()


@pytest.mark.parametrize(
    ("kind", "pictures", "plots"),
    [
        ("run", 1, 1), ("started run", 0, 0), ("autoencoder", 0, 1), ("samples", 3, 0), ("unmeasured samples", 1, 0),
        ("search", 0, 3), ("demo", 6, 4), ("reproduction", 1, 3),
    ],
)  # fmt: skip
def test_page_loads_and_fits(
    kind: str, pictures: int, plots: int, browser: Browser, make_page: Callable[[str], Path], tmp_path: Path
) -> None:
    page = make_page(kind)
    faults: list[str] = []
    for width in WIDTHS:
        look = browser.look(page, width, tmp_path / f"{width}.png")
        assert look.images >= pictures and look.plots >= plots, look
        faults += [f"{width}: {fault}" for fault in faults_of(look)]
    assert not faults, "\n".join([f"{page}: pictures of it are in {tmp_path}", *faults])


def faults_of(look: Look) -> list[str]:
    broken, spilled = (f"broken: {text}" for text in look.broken), (f"spilled: {text}" for text in look.spilled)
    wide = [f"wide: {text}" for text in look.wide] or ["scrolls horizontally"] * look.scrolls
    small = [f"a plot has {scale:.2f} pixels per point" for scale in look.scales if scale < LEAST_SCALE]
    return [*look.errors, *broken, *spilled, *wide, *small, *(f"cut: {word}" for word in look.cut)]


def test_tables_sort_by_a_click(browser: Browser, tmp_path: Path) -> None:
    rows = [
        ["b", "10", "59m10s", "p 0.5"],
        ["a", "9", "3s", "p 1"],
        ["c", "1,000", "1h02m", "p 0.25"],
        ["d"],  # as of a failed trial
    ]
    table = render(
        "reproduction.html",
        commands=[],
        origin="",
        outcome=outcome_of(Table(["name", "images", "time", "setting"], rows)),
    )
    (tmp_path / "page.html").write_text(document("Sorted", table))
    browser.look(tmp_path / "page.html", 400)
    names = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent).join('')"
    found = [browser.value(names)]
    for column in (0, 0, 1, 1, 2, 3):
        browser.value(f"document.querySelectorAll('th')[{column}].click()")
        found.append(browser.value(names))
    # as text, as numbers (9, 10, 1,000), as times and by numbers in text; missing cells come last
    assert found == ["bacd", "abcd", "dcba", "abcd", "cbad", "abcd", "cbad"]


def outcome_of(table: Table) -> Outcome:
    return Outcome(lead="", numbers=[], findings=[Finding("A table", table)], texts=[], differences=[])


def test_a_name_in_a_legend_hides_its_line_and_a_picture_opens(
    browser: Browser, make_page: Callable[[str], Path]
) -> None:
    browser.look(make_page("run"), 1280)
    names = browser.value("[...document.querySelectorAll('svg [id^=name-]')].map(name => name.id)")
    assert len(names) >= 3  # a line for each patch size
    hidden = "[...document.querySelectorAll('svg [id^=line-]')].filter(line => line.style.display === 'none').length"
    for count in (1, 0):
        browser.value(f"document.getElementById('{names[0]}').dispatchEvent(new MouseEvent('click'))")
        assert browser.value(hidden) == count
    browser.value("document.querySelector('figure img').click()")
    assert browser.value("document.querySelector('dialog img').src === document.querySelector('figure img').src")
    browser.value("document.querySelector('dialog').click()")
    browser.value("1")  # the dialog is removed after its event
    assert browser.value("document.querySelector('dialog[open]')") is None


PLACE = """(place => {{
    const svg = document.querySelector("{svg}"), box = svg.getBoundingClientRect();
    scrollTo(0, box.top + scrollY - 100);
    const point = new DOMPoint({x}, {y}).matrixTransform(svg.getScreenCTM());
    return [point.x, point.y];
}})()"""


def place(browser: Browser, svg: str, x: float, y: float) -> tuple[float, float]:
    """Where a point of an SVG is in the window."""
    left, top = browser.value(PLACE.format(svg=svg, x=x, y=y))
    return left, top


def line_page(folder: Path) -> Path:
    """A page with a plot of y = 2 x from 0 to 100, with error bars of 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4))
    axes = figure.subplots()
    axes.errorbar(range(101), [2 * x for x in range(101)], [1] * 101, label="twice", capsize=2)
    axes.set(xlim=(0, 100), ylim=(0, 200), xlabel="x", ylabel="y")
    tidy(axes)
    outcome = Outcome("", [], [], [], [], figures=[(svg(figure), "A line.")])
    (folder / "page.html").write_text(document("A line", outcome.section([], COMMAND)))
    return folder / "page.html"


def test_a_drag_zooms_into_a_range_and_the_reset_returns(browser: Browser, tmp_path: Path) -> None:
    look = browser.look(line_page(tmp_path), 1280)
    assert not look.errors
    (panel,) = browser.value("JSON.parse(document.querySelector('svg').dataset.panels)")
    left, top, right, bottom = panel["box"]
    path = "document.querySelector('[id^=line-0-0] path').getAttribute('d')"
    whole, middle = browser.value(path), (top + bottom) / 2
    ticks = "[...document.querySelectorAll('.ticks text')].map(tick => tick.textContent)"

    def at(share: float) -> tuple[float, float]:
        return place(browser, "svg", left + share * (right - left), middle)

    browser.drag(at(0.2), at(0.3), at(0.4))
    # x from 20 to 40; y from 40 to 80, the bars from 39 to 81, with 5 % of space
    assert browser.value(ticks) == ["20", "25", "30", "35", "40", "40", "50", "60", "70", "80"]
    points = [[float(number) for number in pair.split()] for pair in re.findall(r"[ML] (\S+ \S+)", browser.value(path))]
    assert points[20][0] == pytest.approx(left, abs=0.5) and points[40][0] == pytest.approx(right, abs=0.5)
    assert points[30][1] == pytest.approx(middle, abs=0.5)
    assert browser.value("document.querySelectorAll('.reset:not([hidden])').length") == 1
    browser.click(".reset")
    assert browser.value(path) == whole and browser.value(ticks) == []
    assert browser.value("getComputedStyle(document.querySelector('[id^=xtick]')).display") != "none"


def test_a_point_shows_its_values_and_touch_does_not_zoom(browser: Browser, tmp_path: Path) -> None:
    browser.look(line_page(tmp_path), 400)
    left, top, right, bottom = browser.value("JSON.parse(document.querySelector('svg').dataset.panels)[0].box")
    middle = place(browser, "svg", (left + right) / 2, (top + bottom) / 2)
    browser.drag(middle)
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=middle[0], y=middle[1])
    assert browser.value("document.querySelector('.values').innerText") == "twice\nx 50\ny 100"
    for kind, x in (("touchStart", middle[0]), ("touchMove", middle[0] - 50), ("touchEnd", None)):
        points = [] if x is None else [{"x": x, "y": middle[1]}]
        browser.call("Input.dispatchTouchEvent", type=kind, touchPoints=points)
    assert browser.value("document.querySelectorAll('.ticks').length") == 0


def test_a_brush_filters_lines_and_rows(browser: Browser, search: Path, tmp_path: Path) -> None:
    """The search has p = 0.25, 0.5 and 1 with two learning rates and two seeds, and a failed trial."""
    page = report(str(search), str(tmp_path / "search.html"))
    browser.look(page, 1280)
    lines = "document.querySelectorAll('.parallel [data-trial]:not(.is-off)').length"
    rows = "[...document.querySelectorAll('tr[data-trials]')].filter(row => !row.hidden).length"
    assert browser.value(f"[{lines}, {rows}]") == [12, 7]
    names = "[...document.querySelectorAll('.parallel .axis > text:first-of-type')].map(name => name.textContent)"
    assert browser.value(names) == ["p", "lr", "TFLOP", "held-out loss"]
    x, top, bottom = browser.value("""(() => {
        const line = document.querySelector('.parallel .axis line');
        return ['x1', 'y1', 'y2'].map(name => +line.getAttribute(name));
    })()""")
    third = (bottom - top) / 3
    browser.drag(*(place(browser, ".parallel", x, bottom - share * third) for share in (0.05, 1, 1.95)))
    assert browser.value(f"[{lines}, {rows}]") == [8, 4]  # p = 0.25 and 0.5
    browser.click(".axis:nth-of-type(2) .value")  # and the smaller learning rate
    assert browser.value(f"[{lines}, {rows}]") == [4, 2]
    browser.click(".parallel + figcaption .reset")
    assert browser.value(f"[{lines}, {rows}]") == [12, 7]


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_the_command_of_a_figure_is_copied(has_clipboard: bool, browser: Browser, tmp_path: Path) -> None:
    browser.look(line_page(tmp_path), 1280)
    browser.value("document.addEventListener('copy', () => { document.title = `${getSelection()}`; })")
    if has_clipboard:
        browser.value("navigator.clipboard.writeText = async text => { document.title = text; }")
    else:
        browser.value("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    browser.click(".command summary")
    browser.click("figure .command button")
    assert browser.value("document.title") == COMMAND
    assert browser.value("document.querySelector('figure .command button').textContent") == "copied"


FAULTY = """<!doctype html><html><body style="margin: 0"><img alt="gone" src="data:image/png;base64,AAAA">
<img alt="outside" src="https://patchloom.invalid/a.png"><div style="width: 1000px">wide</div>
<div style="width: 50px">progressiveprogressive</div>
<div class="numbers" style="width: 50px; overflow-wrap: anywhere"><b>a cutintotwolines</b></div>
<div style="overflow: auto; width: 50px"><p style="width: 3000px">scrolled</p></div>
<script>console.error("logged"); undefined.thrown;</script></body></html>"""


def test_faults_of_a_page_are_seen(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "faulty.html").write_text(FAULTY)
    wide, narrow = (browser.look(tmp_path / "faulty.html", width) for width in WIDTHS)
    assert not wide.scrolls and narrow.scrolls
    assert [text.split()[-1] for text in narrow.wide] == ["wide"] and wide.wide == []
    assert [text.split()[-1] for text in wide.spilled] == ["progressiveprogressive"]
    assert wide.cut == narrow.cut == ["cutintotwolines"]
    assert wide.broken == ["gone", "outside"]
    errors = "\n".join(wide.errors)
    assert "logged" in errors and "TypeError" in errors and "asks for https://patchloom.invalid/a.png" in errors
