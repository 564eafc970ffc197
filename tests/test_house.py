"""The house: who may import whom, what must not exist, and files that tools outside read."""

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ROOMS = ("models", "platform", "pipelines", "tune_configs", "benchmarks")
ALLOWED = {
    "models": {"models"},
    "platform": {"platform"},
    "pipelines": {"models", "platform", "pipelines"},
    "benchmarks": {"models", "platform", "pipelines", "benchmarks"},
}
OUTSIDE = {"models": {"ray", "mlflow", "typer", "argparse", "pydantic"}, "platform": {"torch", "diffusers"}}


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_lies_below_them(room: str) -> None:
    files = sorted((ROOT / room).glob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            first, *rest = name.split(".")
            assert first not in ROOMS or (first == "platform" and not rest), f"{path}: {name} without patchloom"
            if first == "patchloom" and rest:
                assert rest[0] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"
            if path.name == "cluster.py" and first == "torch":
                continue  # workers talk through torch.distributed; no network stands there
            assert first not in OUTSIDE.get(room, set()), f"{path.relative_to(ROOT)} imports {name}"


def test_the_platform_folder_does_not_shadow_the_standard_library() -> None:
    assert not list(ROOT.rglob("platform/__init__.py"))
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip(), done.stderr


def test_the_package_is_made_of_relative_links() -> None:
    for room in ROOMS:
        link = ROOT / "patchloom" / room
        assert link.is_symlink() and str(link.readlink()) == f"../{room}"


def test_ray_accepts_the_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(cluster)))
    workers = cluster["available_node_types"]["gpu_worker"]
    assert cluster["provider"]["type"] == "aws"
    assert workers["min_workers"] == 0 < workers["max_workers"] <= cluster["max_workers"]
    assert "min_workers" not in cluster  # Ray drops it there without a word


def test_the_published_schema_is_the_recipes() -> None:
    from patchloom.platform.recipe import recipe_schema

    assert (ROOT / "tune_configs" / "recipe.schema.json").read_text() == recipe_schema()
    assert json.loads(recipe_schema())["additionalProperties"] is False


def test_what_was_tested_together_is_within_the_ranges() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert pins[requirement.name] in requirement.specifier, text


def test_every_dependency_is_imported_by_the_code() -> None:
    import tomllib

    from packaging.requirements import Requirement

    names = {"pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage"}
    used = {
        name.split(".")[0]
        for room in ("models", "platform", "pipelines")
        for path in (ROOT / room).glob("*.py")
        for name in imports_of(path)
    }
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name = Requirement(text).name
        assert names.get(name, name) in used, f"{name} is required and never imported"
