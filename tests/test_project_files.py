"""Files for contributors: CI, pre-commit, releases, citation and issue templates agree with the commands they name."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import patchloom

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def read(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def steps_of(path: str | Path) -> list[dict[str, Any]]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_the_ci_workflow_runs_what_ci_runs() -> None:
    assert [step["run"] for step in steps_of(".github/workflows/ci.yml") if "run" in step] == [".ci/run"]
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    made = set(re.findall(r"^make ([\w-]+)$", script.read_text(), re.MULTILINE))
    assert {"check", "test"} <= made <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_few_rights_and_a_supported_python(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}  # and a job asks for more where it needs more
    assert all(job["timeout-minutes"] <= 360 for job in workflow["jobs"].values())
    least = re.search(r'requires-python = ">=(\S+)"', (ROOT / "pyproject.toml").read_text())
    assert least is not None
    for step in steps_of(path):
        assert ("run" in step) != ("uses" in step)
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
        assert "python-version" not in step.get("with", {}) or step["with"]["python-version"] == least[1]
        # what an outsider chooses, such as the title of a pull request, must not become part of a script
        assert "${{" not in step.get("run", "")


def test_a_release_has_the_wheel_of_its_tag() -> None:
    release = read(".github/workflows/release.yml")
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads `on` as true
    (check,) = (step["run"] for step in steps_of(".github/workflows/release.yml") if "test -f" in step.get("run", ""))
    name = f"dist/patchloom-{patchloom.__version__}-py3-none-any.whl"
    assert name == check.split('"')[1].replace("${GITHUB_REF_NAME#v}", patchloom.__version__)


def test_pre_commit_has_the_checks_and_versions_of_make_check() -> None:
    ruff, local = read(".pre-commit-config.yaml")["repos"]
    assert ruff["rev"] == f"v{PINS['ruff']}"
    assert [hook["id"] for hook in ruff["hooks"]] == ["ruff-format", "ruff-check"]
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\$\(BIN\)/(.*)", recipe)) == {"ruff format --check .", "ruff check .", "mypy"}
    assert [hook["entry"] for hook in local["hooks"]] == [".venv/bin/mypy"]


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= citation.keys()  # what the format requires
    assert (citation["version"], citation["license"]) == (patchloom.__version__, project["license"])
    assert citation["abstract"] == project["description"]
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Wang", "Jiang", "Zheng", "Wang", "He", "Wang", "Chen", "Zhou",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_templates_are_complete(name: str) -> None:
    template = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= template.keys()
    fields = [entry for entry in template["body"] if entry["type"] != "markdown"]
    assert len({entry["id"] for entry in fields}) == len(fields)
    assert all(entry["type"] in ("textarea", "input") and entry["attributes"]["label"] for entry in fields)
    if name == "bug":
        (doctor,) = (entry for entry in fields if entry["id"] == "doctor")
        assert doctor["attributes"]["label"] == "patchloom doctor --json" and doctor["validations"]["required"]


def test_links_of_files_for_contributors_lead_somewhere() -> None:
    for name in ("SECURITY.md", "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
            assert "://" in link or (ROOT / link).exists(), f"{name}: {link}"
