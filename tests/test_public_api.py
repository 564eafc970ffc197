"""The public Python API: `import patchloom` is light, its names exist and are typed, and their examples run."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import SHARED_DATA, run_python, tiny_recipe
from search_folders import write_search_folder

import patchloom
from patchloom.platform.recipe import recipe_yaml

SOURCE = ast.parse(Path(patchloom.__file__).read_text())
HEAVY = ("torch", "ray", "mlflow", "numpy", "pydantic")
LAZY = {name: module for module, names in patchloom._MODULES.items() for name in names}
ERRORS = {"CheckpointError", "Error", "Stopped", "UserError"}
# the files and folders that the example of a name reads
INPUTS = {
    "Sampler": ("registry",),
    "alias_history": ("registry",),
    "average_model": ("averaged run",),
    "compare_models": ("registry",),
    "delete_model": ("registry",),
    "describe_model": ("registry",),
    "evaluate": ("samples", "dataset"),
    "export_model": ("registry",),
    "import_model": ("network-snapshot.pkl",),
    "inspect": ("dataset",),
    "list_versions": ("registry",),
    "load_model": ("registry",),
    "load_trials": ("search",),
    "open_dataset": ("dataset",),
    "prepare": ("photos",),
    "promote_model": ("registry",),
    "prune_model": ("registry",),
    "register": ("run",),
    "report": ("run",),
    "rollback_alias": ("registry",),
    "sample": ("registry",),
    "train": ("dataset", "recipe.yaml"),
    "train_autoencoder": ("dataset",),
    "tune": ("dataset", "search.yaml"),
}
SHARED = SHARED_DATA.parent
SNAPSHOT = SHARED / "golden" / "edm_adm.pkl"
SLOW = {"train_autoencoder", "tune"}


def test_import_loads_no_heavy_library() -> None:
    code = f"import sys, patchloom; print([name for name in {HEAVY} if name in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


def test_import_takes_less_than_a_tenth_of_a_second() -> None:
    code = "import time; start = time.perf_counter(); import patchloom; print(time.perf_counter() - start)"
    assert min(float(run_python(code).stdout) for _ in range(3)) < 0.1


@pytest.mark.parametrize("name", sorted({*patchloom.__all__, *LAZY}))
def test_public_name_resolves_to_what_its_name_says(name: str) -> None:
    value = getattr(patchloom, name)
    assert value.__name__ == name
    assert (value.__doc__ or "").strip(), f"{name} has no docstring"
    assert name in dir(patchloom)
    assert name in (patchloom.__doc__ or ""), f"help(patchloom) does not name {name}"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonesuch"):
        _ = patchloom.nonesuch  # type: ignore[attr-defined]


def test_type_checkers_see_the_lazy_names() -> None:
    (typed,) = (node for node in SOURCE.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("patchloom.")
        for alias in node.names
    }
    assert imported == {name: f"patchloom.{module}" for name, module in LAZY.items()}
    assert set(patchloom.__all__) <= LAZY.keys() | ERRORS | {"load_model"}


def test_a_step_is_a_function_also_after_its_package_is_imported() -> None:
    import patchloom.pipelines.train

    assert inspect.isfunction(patchloom.train) and inspect.isfunction(patchloom.tune)


def example_of(name: str) -> str:
    """The code below `Example:` in a docstring; empty if there is none."""
    lines = (inspect.getdoc(getattr(patchloom, name)) or "").splitlines()
    if "Example:" not in lines:
        return ""
    block = lines[lines.index("Example:") + 1 :]
    end = next((number for number, line in enumerate(block) if line and not line.startswith(" ")), len(block))
    return textwrap.dedent("\n".join(block[:end]))


def with_example() -> list[object]:
    names = sorted(name for name in patchloom.__all__ if example_of(name))
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


@pytest.fixture
def provide(
    images: Path, pixels: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """Puts an input of an example into the working directory, which is empty otherwise."""
    monkeypatch.chdir(tmp_path)

    def put(name: str) -> None:
        if name == "registry":
            patchloom.register(str(trained), "my-model", alias="champion")
        elif name == "recipe.yaml":
            Path(name).write_text(recipe_yaml(tiny_recipe(train__images=40, preview__every_images=0)))
        elif name == "search.yaml":
            Path(name).write_text(
                "name: tiny\nrecipe: recipe.yaml\nspace: {patches.p: {grid: [0.5, 1.0]}}\nbudget: {images: 40}\n"
            )
            put("recipe.yaml")
        elif name == "search":
            write_search_folder(Path(name))
        elif name == "averaged run":
            averages = [{"sigma_rel": width, "snapshot_every_images": 20} for width in (0.05, 0.1)]
            patchloom.train(tiny_recipe(train__images=80, ema=averages), str(pixels), "run", workers=0)
        elif name == "network-snapshot.pkl":
            if not SNAPSHOT.is_file():
                pytest.skip(f"no reference snapshot at {SNAPSHOT}")
            Path(name).symlink_to(SNAPSHOT)
        elif name == "samples":
            patchloom.sample(str(trained), name, seeds="0-7", steps=2, workers=0)
        else:
            Path(name).symlink_to({"photos": images, "dataset": pixels, "run": trained}[name])

    return put


@pytest.mark.ray
@pytest.mark.parametrize("name", with_example())
def test_example_runs(name: str, provide: Callable[[str], None]) -> None:
    for needed in INPUTS.get(name, ()):
        provide(needed)
    exec(compile(example_of(name), f"example of {name}", "exec"), {"patchloom": patchloom})
