"""The structure of the repository: which folder imports which, unique names, and files that other tools read."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "platform", "pipelines", "tune_configs", "benchmarks")
# each part may import itself and the parts before it; a part is a sub-package, or a module directly in its folder
ORDER = (
    "redaction",
    "errors",
    "pickles",
    "models",
    *(f"platform.{part}" for part in ("progress", "files", "recipe", "records", "compute", "dataset", "tracking")),
    *(f"pipelines.{part}" for part in ("pages", "prepare", "train", "sample", "registry", "evaluate", "tune")),
    *(
        f"pipelines.{part}"
        for part in (
            "recipes",
            "pyfunc",
            "serve",
            "inspect",
            "cache",
            "launch",
            "doctor",
            "reproduce",
            "report",
            "demo",
            "cli",
        )
    ),
    "benchmarks",
)
OUTSIDE = {"models": {"ray", "mlflow", "typer", "argparse", "pydantic"}, "platform": {"torch", "diffusers"}}
TORCH_DISTRIBUTED = "platform/compute"  # only torch.distributed, which connects workers


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any level of indentation."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {name if is_module(name := f"{node.module}.{alias.name}") else node.module for alias in node.names}
    return names


def is_module(name: str) -> bool:
    """Whether a dotted name is a module of Patchloom, not a name in a module."""
    path = ROOT / Path(*name.removeprefix("patchloom.").split("."))
    return name.startswith("patchloom.") and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def module_of(path: Path) -> str:
    """The dotted name of a file below `patchloom`, `models.loss` for models/loss.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """Which entry of ORDER a module belongs to."""
    found = [part for part in ORDER if module == part or module.startswith(f"{part}.")]
    assert found, f"{module} is not in ORDER"
    return found[0]


SOURCES = {
    module_of(path): path
    for folder in ("models", "platform", "pipelines", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def own_imports(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    names = {name.removeprefix("patchloom.") for name in imports_of(SOURCES[module]) if name.startswith("patchloom.")}
    return names - {"errors", "redaction", "pickles"}


def test_imports_follow_the_order_of_parts() -> None:
    for module in SOURCES:
        if module in ("pipelines", "platform"):
            continue
        for name in own_imports(module):
            here, there = ORDER.index(part_of(module)), ORDER.index(part_of(name))
            assert there <= here, f"{module} imports {name}, which comes later in ORDER"


def test_no_two_modules_import_each_other() -> None:
    graph = {module: {name for name in own_imports(module) if name in SOURCES} for module in SOURCES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError with the modules


def test_modules_do_not_import_from_their_own_package() -> None:
    for module, path in SOURCES.items():
        if path.name != "__init__.py":
            package = module.rpartition(".")[0]
            assert package not in own_imports(module), f"{module} imports from its own package: name the module"


def top_level_names(path: Path) -> Iterator[str]:
    """Public functions, classes and constants that a module defines; not its type variables."""
    for node in ast.parse(path.read_text()).body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign) and not ast.unparse(node.value).startswith("TypeVar("):
            targets = [part for target in node.targets for part in getattr(target, "elts", [target])]
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def is_command(module: str, name: str) -> bool:
    """Whether a name is a function of the command line, which has the name of the function that it calls."""
    return part_of(module) == "pipelines.cli" and name.islower()


def test_no_two_modules_define_the_same_public_name() -> None:
    modules: dict[str, list[str]] = {}
    for module, path in SOURCES.items():
        if path.name == "__init__.py" or part_of(module) == "benchmarks":
            continue  # a package only re-exports
        for name in top_level_names(path):
            if not name.startswith("_") and name != "main" and not is_command(module, name):
                modules.setdefault(name, []).append(module)
    assert {name: found for name, found in modules.items() if len(found) > 1} == {}


@pytest.mark.parametrize("folder", ["models", "platform", "pipelines", "benchmarks"])
def test_folder_imports_only_the_libraries_it_may(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports_of(path):
            first, *rest = name.split(".")
            assert first not in FOLDERS or (first == "platform" and not rest), f"{path}: {name} without patchloom"
            if first == "torch" and path.relative_to(ROOT).as_posix().startswith(TORCH_DISTRIBUTED):
                continue
            assert first not in OUTSIDE.get(folder, set()), f"{path.relative_to(ROOT)} imports {name}"


def test_platform_folder_does_not_shadow_the_standard_library() -> None:
    assert not list(ROOT.rglob("platform/__init__.py"))
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip(), done.stderr


def test_package_consists_of_relative_links() -> None:
    for folder in FOLDERS:
        link = ROOT / "patchloom" / folder
        assert link.is_symlink() and str(link.readlink()) == f"../{folder}"


def test_published_schema_is_that_of_recipes() -> None:
    from patchloom.platform.recipe import recipe_schema

    assert (ROOT / "tune_configs" / "recipe.schema.json").read_text() == recipe_schema()
    assert json.loads(recipe_schema())["additionalProperties"] is False


def test_constraints_are_within_the_ranges_of_the_dependencies() -> None:
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    tested = project["optional-dependencies"]["dev"] + project["optional-dependencies"]["docs"]
    for text in project["dependencies"] + tested:
        requirement = Requirement(text)
        assert pins[requirement.name] in requirement.specifier, text


def test_every_dependency_is_imported() -> None:
    import tomllib

    from packaging.requirements import Requirement

    names = {"pillow": "PIL", "pyyaml": "yaml", "scikit-image": "skimage"}
    used = {
        name.split(".")[0]
        for folder in ("models", "platform", "pipelines")
        for path in (ROOT / folder).rglob("*.py")
        for name in imports_of(path)
    }
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name = Requirement(text).name
        assert names.get(name, name) in used, f"{name} is required and never imported"


def test_functions_and_files_are_short() -> None:
    """As CONTRIBUTING says: 60 lines without the docstring, and 550 lines."""
    long = []
    for path in (path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text()
        if len(text.splitlines()) > 550:
            long.append(path.name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and path.parent.name != "cli":
                docstring = (ast.get_docstring(node, clean=False) or "").count("\n")
                if (node.end_lineno or 0) - node.lineno - docstring > 60:
                    long.append(f"{path.name}: {node.name}")
    assert not long
