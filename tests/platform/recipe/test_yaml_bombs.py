"""YAML bombs: aliases of aliases, values inside of themselves and deep nesting are refused within seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import within

from patchloom.errors import UserError
from patchloom.pipelines.launch.packing import pack_command
from patchloom.platform.compute.resources import load_resources
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.recipe.search import load_search
from patchloom.platform.recipe.sections import parse_yaml

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
BOMBS = {
    "aliases of a name": LAUGHS + "name: *a11\n",
    "aliases of a search": LAUGHS + "name: x\nspace: {patches.p: {grid: *a11}}\n",
    "aliases of keys": "a: &a {x: 1}\n"
    + "".join(f"b{n}: &b{n} {{<<: [*{'a' if n == 0 else f'b{n - 1}'}]}}\n" for n in range(90)),
    "itself": "name: x\ntrain: &t {images: *t}\n",
    "list in itself": "name: &n [*n]\n",
    "deep list": "name: " + "[" * 5000 + "]" * 5000 + "\n",
    "deep mapping": "name: " + "{a: " * 5000 + "}" * 5000 + "\n",
    "long number": "name: x\ntrain: {images: " + "9" * 5000 + "}\n",
    "no date": "name: 2020-99-99\n",
    "too many bytes": "name: x\n" + "# comment\n" * 200_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("load", [load_recipe, load_search])
def test_bomb_is_refused_in_one_line(bomb: str, load: Callable[[str], object], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BOMBS[bomb])

    def refuse() -> str:
        with pytest.raises(UserError) as refused:
            load(str(tmp_path / "a.yaml"))
        return str(refused.value)

    line = within(30, refuse)
    assert "\n" not in line and len(line) < 1000


def test_bomb_in_an_option_and_in_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(LAUGHS)
    text = "{a: &a [1,1,1,1,1,1,1,1], " + ", ".join(
        f"b{n}: &b{n} [{', '.join([f'*{chr(97)}' if n == 0 else f'*b{n - 1}'] * 10)}]" for n in range(8)
    ) + "}"  # fmt: skip
    for work in (
        lambda: load_recipe("demo_pixels", [f"name={text}"]),
        lambda: load_resources([str(tmp_path / "a.yaml")]),
        lambda: load_resources([f"labels={text}"]),
        lambda: pack_command(["train", str(tmp_path / "a.yaml")], {"recipe": str(tmp_path / "a.yaml")}, tmp_path / "p"),
    ):
        with pytest.raises(UserError) as refused:
            work()
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 1000


def test_aliases_and_merges_of_ordinary_files_are_read() -> None:
    found = parse_yaml("base: &b {p: 0.5, sizes: [1, 2]}\nother: {<<: *b, p: 1.0}\nagain: *b\n")
    assert found["other"] == {"p": 1.0, "sizes": [1, 2]} and found["again"] == found["base"]
    assert parse_yaml("") is None and parse_yaml("0.5") == 0.5
