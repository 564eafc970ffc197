"""Commands as jobs on a real head with a token: exit codes, files that travel, logs, stop, and refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from heads import TOKEN, Head, ray_head
from helpers import environment, tiny_recipe

from patchloom.errors import UserError
from patchloom.pipelines.launch.launching import own_digest
from patchloom.pipelines.launch.packing import FILE_ARGUMENTS, PLACES, REFERENCES, pack_command
from patchloom.pipelines.launch.settings import travelling_settings
from patchloom.platform.compute.answering import check_ray_address
from patchloom.platform.compute.job_server import JobServer
from patchloom.platform.files.storage import file_sha256
from patchloom.platform.recipe.run_recipe import load_recipe
from patchloom.platform.recipe.search import load_search

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def head(mlflow_store: Path) -> Iterator[Head]:
    """A cluster of one node that has the packages but not this code."""
    with ray_head(PYTHONPATH="", MLFLOW_TRACKING_URI=f"sqlite:///{mlflow_store / 'mlflow.db'}") as started:
        yield started


def command(*words: str, folder: Path, **variables: str) -> "subprocess.Popen[str]":
    """Start `patchloom launch` with the token of the head."""
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "patchloom", "launch", *words], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(*words: str, folder: Path, **variables: str) -> tuple[int, str]:
    """The exit code and the output of `patchloom launch`."""
    with command(*words, folder=folder, **variables) as process:
        said, _ = process.communicate(timeout=300)
    return process.returncode, said


def test_prepare_as_a_job_gives_the_same_bytes(head: Head, images: Path, pixels: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels" / "mine.csv"
    labels.parent.mkdir()
    names = sorted(path.relative_to(images).as_posix() for path in images.rglob("*.png") if path.name != "note.png")
    labels.write_text("key,label\n" + "".join(f"{name},{name.split('/')[0]}\n" for name in names))
    out, own = tmp_path / "out", tmp_path / "own"
    arguments = [str(images), "--resolution", "16", "--labels", "labels/mine.csv", "--workers", "0"]
    code, said = run("--address", head.jobs, "prepare", *arguments, str(out), folder=tmp_path, HIDDEN="value-of-hidden")
    assert code == 0, said
    assert "\r" not in said and "INFO" not in said
    subprocess.run([sys.executable, "-m", "patchloom", "prepare", *arguments, str(own)], cwd=tmp_path, check=True)
    (one,), (other,) = (sorted((folder / "shards").iterdir()) for folder in (out, own))
    assert file_sha256(one) == file_sha256(other)

    job = re.search(r"patchloom-prepare-\S+", said)[0]  # type: ignore[index]
    with environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN):
        code, listed = run("--address", head.jobs, "status", folder=tmp_path)
        assert code == 0 and job in listed and "succeeded" in listed
        code, logged = run("logs", job, "--address", head.jobs, folder=tmp_path)
        assert code == 0 and str(out) in logged


@pytest.mark.slow
def test_exit_code_of_the_command_is_that_of_launch(head: Head, tmp_path: Path) -> None:
    code, said = run("inspect", "/no/such/dataset", folder=tmp_path, RAY_API_SERVER_ADDRESS=head.jobs)
    assert code == 2 and "/no/such/dataset" in said and "Traceback" not in said
    job = re.search(r"patchloom-inspect-\S+", said)[0]  # type: ignore[index]
    assert run("logs", job, "--address", head.jobs, folder=tmp_path)[0] == 2


def test_addresses_and_tokens_are_refused_within_seconds(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of all mistakes it is: no service, another service, no token, a wrong token."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", head.gcs)
    with pytest.raises(UserError, match="RAY_AUTH_MODE"):
        check_ray_address()
    with pytest.raises(UserError, match="RAY_AUTH_MODE"):
        JobServer(head.jobs)
    monkeypatch.setenv("RAY_ADDRESS", head.jobs)
    with pytest.raises(UserError, match="launch"):
        check_ray_address()
    for address in (head.gcs, f"http://{head.gcs}", head.client):
        with pytest.raises(UserError, match=re.escape(address)):
            JobServer(address)


@pytest.mark.slow  # Ray's client server starts late on a busy machine
def test_client_addresses_without_a_token_are_refused(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", head.client)
    with pytest.raises(UserError, match="RAY_AUTH_MODE"):
        check_ray_address()


@pytest.mark.parametrize("kind", ["gcs", pytest.param("client", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("token", "code"), [({"RAY_AUTH_TOKEN": TOKEN}, 0), ({"RAY_AUTH_TOKEN": "wrong-token-0123456789"}, 2)]
)
def test_token_is_sent(token: dict[str, str], code: int, kind: str, head: Head, tmp_path: Path) -> None:
    check = "from patchloom.platform.compute.answering import check_ray_address; check_ray_address()"
    for address in (getattr(head, kind),):
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_ADDRESS": address, **token, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0) == (code == 0), done.stderr
        assert code == 0 or ("UserError" in done.stderr and "RAY_AUTH_TOKEN" in done.stderr)
    assert run("status", "--address", head.jobs, folder=tmp_path, **token)[0] == code


@pytest.mark.slow
def test_stop_leaves_a_checkpoint_and_ctrl_c_leaves_the_job(head: Head, pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(train__images=2_000_000, train__checkpoint_every_images=10_000_000, train__log_every_images=80)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe.model_dump(mode="json")))
    out = tmp_path / "run"
    arguments = ["train", "recipe.yaml", "--data", str(pixels), "--out", str(out), "--workers", "0"]
    process = command("--address", head.jobs, *arguments, folder=tmp_path)
    wait_until(lambda: (out / "progress.jsonl").exists() and (out / "progress.jsonl").stat().st_size > 0)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 130 and "--resume" not in said, said  # it was not stopped
    job = re.search(r"patchloom-train-\S+", said)[0]  # type: ignore[index]
    wait_until(lambda: checkpoints(out))
    (asked,) = checkpoints(out)
    assert "running" in run("status", job, "--address", head.jobs, folder=tmp_path)[1]

    assert run("stop", job, "--address", head.jobs, folder=tmp_path)[0] == 0
    assert "stopped" in run("status", job, "--address", head.jobs, folder=tmp_path)[1]
    assert run("logs", job, "--address", head.jobs, "--follow", folder=tmp_path)[0] == 143
    assert checkpoints(out)[-1] > asked
    assert run("stop", job, "--address", head.jobs, folder=tmp_path)[0] == 0  # over already
    assert run("logs", "no-job", "--address", head.jobs, folder=tmp_path)[0] == 2


def wait_until(happens: object, seconds: float = 120) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not happens():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.2)


def checkpoints(run: Path) -> list[str]:
    """The complete checkpoints of a run."""
    return sorted(path.parent.name for path in run.glob("checkpoints/step-*/checkpoint.json"))


def test_data_of_this_machine_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for arguments in ({"source": "photos"}, {"out": "run"}, {"model": "photos"}):
        with pytest.raises(UserError, match=next(iter(arguments.values()))):
            pack_command([], arguments, tmp_path / "job")
    kept = {"source": "/mnt/photos", "out": "s3://bucket/run", "model": "models:/a@champion", "recipe": "demo_pixels"}
    assert pack_command(list(kept.values()), dict(kept), tmp_path / "job") == list(kept.values())


def test_small_files_travel_under_a_path_of_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, job = tmp_path / "here", tmp_path / "job"
    here.mkdir()
    monkeypatch.chdir(here)
    (here / "my.yaml").write_text("name: a")
    (tmp_path / "seeds.txt").write_text("1\n")
    words = ["train", "my.yaml", f"--seeds={tmp_path / 'seeds.txt'}"]
    packed = pack_command(words, {"recipe": "my.yaml", "seeds": str(tmp_path / "seeds.txt")}, job)
    assert packed == ["train", "my.yaml", "--seeds=files/seeds.txt"]
    assert (job / "my.yaml").read_text() == "name: a" and (job / "files" / "seeds.txt").read_text() == "1\n"
    with pytest.raises(UserError, match=r"mine\.yaml"):
        pack_command(["train"], {"recipe": "mine.yaml"}, job)
    for elsewhere in ("/on/nodes.yaml", "celeba64.yaml", "celeba64"):  # on the nodes, or shipped
        assert pack_command(["train", elsewhere], {"recipe": elsewhere}, job) == ["train", elsewhere]
    (here / "large.csv").write_bytes(b"x" * 11_000_000)
    with pytest.raises(UserError, match="11 MB"):
        pack_command(["prepare"], {"labels": "large.csv"}, job)


def test_the_recipe_of_a_search_travels_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, job = tmp_path / "here", tmp_path / "job"
    for file, text in {"a/search.yaml": "recipe: ../b/mine.yaml", "b/mine.yaml": "name: mine"}.items():
        (here / file).parent.mkdir(parents=True)
        (here / file).write_text(text)
    monkeypatch.chdir(here)
    assert pack_command(["a/search.yaml"], {"search": "a/search.yaml"}, job) == ["a/search.yaml"]
    assert (job / "a/../b/mine.yaml").read_text() == "name: mine"
    monkeypatch.chdir(here / "b")  # the search is not below the working directory, so it gets another path
    assert pack_command(["../a/search.yaml"], {"search": "../a/search.yaml"}, job) == ["files/search.yaml"]
    assert (job / "files/../b/mine.yaml").is_file()
    (here.parent / "far.yaml").write_text("name: far")
    (here / "a/search.yaml").write_text("recipe: ../../far.yaml")
    with pytest.raises(UserError, match="far"):
        pack_command(["../a/search.yaml"], {"search": "../a/search.yaml"}, job)


def test_a_variant_travels_with_the_keys_of_its_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, job = tmp_path / "here", tmp_path / "job"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "far.yaml").write_text("base: demo_pixels\nname: far\npatches: {p: 0.25}\n")
    (here / "mine.yaml").write_text("base: ../far.yaml\nname: mine\nseed: 5\n")
    (here / "search.yaml").write_text("name: s\nrecipe: mine.yaml\nbudget: {images: 9}\nspace: {seed: {grid: [1]}}\n")
    expected = load_recipe("mine.yaml")
    assert (expected.patches.p, expected.seed) == (0.25, 5)
    for argument, value in (("recipe", "mine.yaml"), ("search", "search.yaml")):
        assert pack_command([value], {argument: value}, job / argument) == [value]
    monkeypatch.chdir(job)
    assert load_recipe("recipe/mine.yaml") == load_search("search/search.yaml")[1] == expected
    monkeypatch.chdir(here)
    for change, named in (
        ("base: nowhere.yaml", r"nowhere\.yaml"),
        ("train: {images: 5, init_from: mine.yaml}", r"mine\.yaml"),
    ):
        (tmp_path / "far.yaml").write_text(f"name: far\n{change}\n")
        with pytest.raises(UserError, match=named):
            pack_command(["mine.yaml"], {"recipe": "mine.yaml"}, job)


def test_initial_weights_of_a_recipe_do_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    for weights, fits in {"old": False, "s3://bucket/old": True, "models:/old/1": True}.items():
        (tmp_path / "mine.yaml").write_text(f"name: mine\ntrain: {{init_from: '{weights}'}}")
        if fits:
            pack_command(["mine.yaml"], {"recipe": "mine.yaml"}, tmp_path / "job")
            continue
        with pytest.raises(UserError, match="old"):
            pack_command(["mine.yaml"], {"recipe": "mine.yaml"}, tmp_path / "job")


def test_reproduction_needs_places_that_its_job_can_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = {"data": ["celeba=s3://bucket/faces", "ffhq=s3://bucket/ffhq"], "out": "s3://bucket/table1"}
    pack_command(["reproduce", "table1"], there, tmp_path / "job")
    for changed in ({"data": ["celeba=faces"]}, {"out": "table1"}, {"out": None}):
        with pytest.raises(UserError):
            pack_command(["reproduce", "table1"], there | changed, tmp_path / "job")


def test_every_argument_that_can_be_a_path_is_known() -> None:
    """A new option that takes text must be added to a set of packing.py, or here."""
    import typer

    from patchloom.pipelines.cli.app import app

    no_paths = {
        "crop", "resize", "image_member", "precision", "allow_backbone", "set_", "register", "register_best", "widths",
        "patch", "sampler", "ladder", "churn_between", "guidance_between", "size", "canvas", "label", "format",
        "metrics", "subjects", "name", "alias", "if_better", "command", "env", "address", "job", "env_file",
        "where", "sort", "page", "kind", "like", "split", "classes", "outpaint_method", "table", "license_id",
    }  # fmt: skip

    def texts(group: Any) -> set[str]:
        if hasattr(group, "commands"):
            return set().union(*map(texts, group.commands.values()))
        return {one.name for one in group.params if "str" in str(getattr(one, "type_descriptor", one).annotation)}

    found = texts(typer.main.get_command(app))
    assert len(found) > 30
    assert found - no_paths - FILE_ARGUMENTS - PLACES - REFERENCES == set()


def test_secrets_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////tmp/mlflow.db")
    monkeypatch.setenv("PATCHLOOM_CACHE", "/here")
    monkeypatch.setenv("PATCHLOOM_OTHER", "1")
    settings = travelling_settings([], is_this_machine=False)
    assert settings["AWS_ENDPOINT_URL"] == "http://store:9000" and settings["PATCHLOOM_OTHER"] == "1"
    assert not {"AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_URI", "PATCHLOOM_CACHE"} & settings.keys()
    for name in ("AWS_SECRET_ACCESS_KEY", "NOT_SET_HERE"):
        with pytest.raises(UserError, match=name):
            travelling_settings([name], is_this_machine=False)
    for value in ("http://user:hidden@mlflow:5000", "http://localhost:5000"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
            travelling_settings([], is_this_machine=False)


def test_code_digest_does_not_depend_on_how_patchloom_is_installed(tmp_path: Path) -> None:
    from patchloom.pipelines.launch.node import code_digest
    from patchloom.pipelines.launch.packing import pack_code

    pack_code(tmp_path)
    assert code_digest(tmp_path / "patchloom") == own_digest()
    (tmp_path / "patchloom" / "errors.py").write_text("")
    assert code_digest(tmp_path / "patchloom") != own_digest()


def test_secrets_are_read_from_a_file_on_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patchloom.platform.compute.session import read_environment_file

    (tmp_path / "env").write_text("# a secret\nexport SECRET_OF_TEST='a=b'\n\n")
    monkeypatch.setenv("PATCHLOOM_ENV_FILE", str(tmp_path / "env"))
    monkeypatch.setenv("SECRET_OF_TEST", "")
    read_environment_file()
    assert os.environ["SECRET_OF_TEST"] == "a=b"
    monkeypatch.setenv("PATCHLOOM_ENV_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none"):
        read_environment_file()
