"""The documentation: its site builds strictly and offline, and its commands, recipes and code fit the program."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from browser import Browser
from command_lines import BLOCK, all_commands, block_commands, check_command, check_mention, mentioned_commands

import patchloom
from patchloom.platform.recipe import check_recipe
from patchloom.platform.recipe.files import ConfigFile
from patchloom.platform.recipe.run_recipe import recipe_values
from patchloom.platform.recipe.search import load_search
from patchloom.platform.records.evaluation import EvaluationIdentity, EvaluationResult
from patchloom.platform.records.record import Record
from patchloom.platform.records.run import ProgressLine
from patchloom.platform.records.search import TrialRow

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/emoji/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
CITES_PAPER = re.compile(r"Patch Diffusion, (Eq\.|section|Figure|Table)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page in one language."""
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_site_builds_strictly_and_fetches_nothing(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert {page.relative_to(site).as_posix() for page in pages} >= {
        "index.html", "quickstart.html", "why.html", "reference/commands.html", "reference/python.html",
        "reference/method.html", "reference/recipe-keys.html", "decisions.html", "changelog.html",
    }  # fmt: skip
    for page in pages:
        text = page.read_text()
        fetched = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=\"?(https?:[^\"> ]*)", text)
        assert not fetched, f"{page.name}: {fetched}"
        shown = re.sub(r"<[^>]+>", "", text)
        assert not re.search(r"--8 ?(<|&lt;)", shown), f"{page.name}: an excerpt is missing"
        assert not re.search(r"<h\d[^>]*>[^<]*\{#", text), f"{page.name}: an anchor is part of a heading"


def test_every_command_has_a_section(site: Path) -> None:
    text = (site / "reference/commands.html").read_text()
    commands = list(all_commands())
    assert len(commands) > 30
    for command in commands:
        assert f'id="{command.replace(" ", "-")}"' in text, command


def test_commands_of_all_pages_are_accepted() -> None:
    texts = [(page, page.read_text()) for page in PAGES]
    found = [(page, check_command, line) for page, text in texts for line in block_commands(text)]
    found += [(page, check_mention, line) for page, text in texts for line in mentioned_commands(text)]
    assert len(found) > 120
    for page, check, line in found:
        try:
            check(line)
        except BaseException as error:  # typer exits for some mistakes
            pytest.fail(f"{name_of(page)}: {line}: {error!r}")


def test_modules_and_targets_of_all_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text()
        for module in re.findall(r"python -m (patchloom[\w.]*)", text):
            assert find_spec(module), f"{name_of(page)}: {module}"
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
            assert target in targets, f"{name_of(page)}: make {target}"


def test_code_of_all_pages_names_what_patchloom_has() -> None:
    for page in PAGES:
        for code in blocks(page, "python"):
            if code.startswith("--8<--"):  # an excerpt of a file that other tests use
                continue
            for node in ast.walk(ast.parse(code)):
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "patchloom"
                ):
                    assert hasattr(patchloom, node.attr), f"{name_of(page)}: patchloom.{node.attr}"


def recipes_on_pages() -> Iterator[tuple[Path, str]]:
    """The blocks of YAML that are recipes or variants of one; others are searches and settings of nodes."""
    for page in PAGES:
        for text in blocks(page, "yaml"):
            if not text.startswith("--8<--") and "space:" not in text and "name:" in text:
                yield page, text


def test_recipes_of_all_pages_are_valid(tmp_path: Path) -> None:
    found = list(recipes_on_pages())
    assert found
    for page, text in found:
        (tmp_path / "recipe.yaml").write_text(text)
        try:
            check_recipe(recipe_values(ConfigFile.find(str(tmp_path / "recipe.yaml"))))
        except ValueError as error:
            pytest.fail(f"{name_of(page)}: {error}")


def test_searches_of_all_pages_are_valid(tmp_path: Path) -> None:
    found = [(page, text) for page in PAGES for text in blocks(page, "yaml") if "space:" in text]
    assert found
    (tmp_path / "my.yaml").write_text("base: demo_pixels\nname: mine\n")
    for page, text in found:
        (tmp_path / "search.yaml").write_text(text)
        try:
            load_search(tmp_path / "search.yaml")
        except ValueError as error:
            pytest.fail(f"{name_of(page)}: {error}")


def test_blocks_are_closed() -> None:
    for page in PAGES:
        assert len(BLOCK.findall(page.read_text())) * 2 == len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)), (
            page
        )


def functions_that_cite_the_paper() -> Iterator[str]:
    """Public functions and classes of models/, with methods, whose docstring cites an equation or a section."""
    for path in sorted((ROOT / "models").glob("*.py")):
        nodes: list[tuple[str, ast.AST]] = [(f"patchloom.models.{path.stem}", ast.parse(path.read_text()))]
        while nodes:
            name, node = nodes.pop()
            for inner in getattr(node, "body", []):
                if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                    nodes.append((f"{name}.{inner.name}", inner))
                    if CITES_PAPER.search(ast.get_docstring(inner) or ""):
                        yield f"{name}.{inner.name}"


def test_map_of_the_paper_has_all_functions_that_cite_it() -> None:
    text = (ROOT / "docs" / "paper-map.md").read_text()
    mapped = set(re.findall(r"method\.md#(patchloom\.[\w.]+)", text))
    cited = set(functions_that_cite_the_paper())
    assert len(cited) > 10 and cited <= mapped, cited - mapped
    for test in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / test).is_file(), test


def test_readme_is_one_screen_with_links_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 80
    assert "\nmake demo " in text and "\nmake test " in text
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.pages
@pytest.mark.parametrize("width", [1280, 400])
def test_pages_of_the_site_in_a_browser(site: Path, browser: Browser, width: int) -> None:
    for page in sorted(site.rglob("*.html")):
        if page.parent.name in ("decisions", "searches") or page.name == "404.html":
            continue  # texts alone, a page of another kind, and one that is made for a server
        look = browser.look(page, width)
        outside = [error for error in look.errors if not error.startswith("asks for file://")]
        assert (outside, look.broken, look.scrolls) == ([], [], False), f"{page.name}: {look.wide[:3]}"


SEARCH = """new Promise(done => {
  const input = document.querySelector('.md-search__input');
  const found = () => document.querySelectorAll('.md-search-result__link');
  document.querySelector('#__search').click();
  input.focus();
  input.value = 'guidance';
  const look = left => {
    input.dispatchEvent(new KeyboardEvent('keyup', { bubbles: true, key: 'e' }));
    if (found().length || !left) done([...found()].map(link => link.getAttribute('href')));
    else setTimeout(() => look(left - 1), 200);
  };
  look(300);
})"""


@pytest.mark.pages
def test_search_of_the_site_works_without_a_server(site: Path, browser: Browser) -> None:
    browser.call("Emulation.setFocusEmulationEnabled", enabled=True)
    browser.look(site / "how-to" / "search.html", 1280)
    links = browser.call("Runtime.evaluate", expression=SEARCH, returnByValue=True, awaitPromise=True)["result"][
        "value"
    ]
    assert any("concepts.html" in link for link in links)


@pytest.mark.parametrize(("record", "section"), [
    (ProgressLine, "A run"), (TrialRow, "A search"), (EvaluationResult, "An evaluation"),
    (EvaluationIdentity, "An evaluation"),
])  # fmt: skip
def test_every_field_of_a_line_has_its_meaning(record: type[Record], section: str) -> None:
    text = (ROOT / "docs" / "formats.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
    assert set(record.model_fields) - {"format_version"} <= set(re.findall(r"`(\w+)`", " ".join(rows)))
