"""Dockerfile, compose file and scripts: linters and specifications, and that all files fit together."""

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_lines import command_lines, parse
from compose_spec.models import ComposeSpecification
from docker.utils.build import exclude_paths
from pydantic import ValidationError

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCRIPTS = sorted(DEPLOY.rglob("*.sh"))
TEXTS = [ROOT / "ray_cluster.yaml", ROOT / "docs/clusters.md", *sorted(DEPLOY.rglob("*.*"))]


def tool(name: str) -> str:
    """A command that the development extra installs."""
    return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_no_remarks(script: Path) -> None:
    for command in (["bash", "-n"], [tool("shellcheck"), "--severity=style"]):
        done = subprocess.run([*command, str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_has_no_remarks() -> None:
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_image_contains_the_sources_and_no_data(tmp_path: Path) -> None:
    """The context of `docker build`, as Docker's own library reads .dockerignore."""
    context = tmp_path / "context"
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, context / name, follow_symlinks=False)
    for name in ("pixels/dataset.json", "run/model/model.json", ".venv/bin/python", ".git/config", "deploy/.env"):
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text("")
    kept = exclude_paths(str(context), (ROOT / ".dockerignore").read_text().splitlines())
    files = {name for name in kept if (context / name).is_file() and not (context / name).is_symlink()}
    files -= {".dockerignore"}  # Docker always sends it
    assert {name.split("/")[0] for name in files} == {
        "LICENSE", "README.md", "benchmarks", "constraints.txt", "deploy", "docs", "models", "patchloom", "pipelines",
        "platform", "pyproject.toml", "tune_configs",
    }  # fmt: skip
    assert {name for name in files if name.startswith(("deploy", "docs"))} == {
        *(f"deploy/node/{name}.sh" for name in ("setup", "drain", "spot_notice")), "docs/nightly.py",
    }  # fmt: skip
    sources = {name for name in listed if name.endswith(".py") and name.split("/")[0] in ("models", "pipelines")}
    assert sources <= files
    assert {"patchloom/models", "patchloom/pipelines"} <= set(kept)  # the links


def test_everything_that_the_dockerfile_copies_exists() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(?:--chown=\S+ )?(\S+) ", text, re.MULTILINE)
    assert copied and all((ROOT / name).exists() for name in copied)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    assert [name for _, name in stages][-2:] == ["cpu", "gpu"]
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE) == ["1000"]  # no later stage goes back to root
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "s3" in project["optional-dependencies"]  # the image and setup.sh install it


def test_compose_file_fits_the_specification(compose: dict[str, Any]) -> None:
    content = {key: value for key, value in compose.items() if not key.startswith("x-")}
    ComposeSpecification.model_validate(content, extra="forbid")
    content["services"]["head"]["health_check"] = {}
    with pytest.raises(ValidationError, match="health_check"):
        ComposeSpecification.model_validate(content, extra="forbid")


def test_compose_services_wait_for_what_they_need(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            finishes = how["condition"] == "service_completed_successfully"
            assert finishes == (needed == "bucket") and (finishes or services[needed]["healthcheck"]), name
    assert list(services["worker"]["depends_on"]) == ["head"] and "ports" not in services["worker"]
    published = list(itertools.chain(*(service.get("ports", []) for service in services.values())))
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_compose_file_has_no_secret_and_the_example_names_all(compose: dict[str, Any]) -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    example = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOY / "env.example").read_text(), re.MULTILINE))
    assert set(re.findall(r"\$\{(\w+)", text)) == set(example)
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {"RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert all(not example[name] for name in required)
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/deploy/.env" in ignored and "/dist/" not in ignored  # `dist/` is there without the first slash
    assert "dist/" in ignored


def test_commands_in_files_and_docs_exist_with_their_options() -> None:
    found = [
        (path, line)
        for path in TEXTS
        if path.is_file() and path.suffix != ".xz"
        for line in command_lines(path.read_text())
    ]
    assert {path.name for path, _ in found} >= {
        "ray_cluster.yaml", "gcp.yaml", "on_premise.yaml", "cluster.yaml", "train.yaml", "compose.yaml", "slurm.sh"
    }  # fmt: skip
    for path, line in found:
        try:
            parse(line)
        except Exception as error:
            pytest.fail(f"{path.name}: patchloom {' '.join(line)}: {error}")
