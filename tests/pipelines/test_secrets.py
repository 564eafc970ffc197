"""Secrets: credentials in addresses and variables are in no file, no line, no page and no table of MLflow."""

import io
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from helpers import tiny_recipe

from patchloom.errors import CheckpointError, UserError
from patchloom.pipelines.cli import main
from patchloom.pipelines.launch.launching import LaunchOptions, launch
from patchloom.pipelines.tune.trials import search_job
from patchloom.pipelines.tune.tuning import tune
from patchloom.platform.dataset.prepared import open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.patience import StoreError
from patchloom.platform.recipe import recipe_yaml
from patchloom.platform.recipe.search import load_search
from patchloom.platform.tracking.store import registry_uri, tracking_uri, use_stores
from patchloom.redaction import RedactedStream, redacted, redacted_values

SECRET = "pla/nted+Secret0"
KEYS = f"PLANTEDKEY:{quote(SECRET, safe='')}"
PASSWORD = "plantedPassw0rd"
MARKS = (SECRET, quote(SECRET, safe=""), PASSWORD)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://KEY:a/b+c@bucket/x y", "s3://bucket/x y"),
        ("s3://KEY@bucket", "s3://bucket"),
        ("'http://bob:pw@host:5000/p' failed", "'http://host:5000/p' failed"),
        ("postgresql+psycopg2://bob:pw@host/db?sslmode=on", "postgresql+psycopg2://host/db?sslmode=on"),
        ("postgresql://host/db?user=a&password=pw&x=1", "postgresql://host/db?user=a&password=***&x=1"),
        ("https://a/b?X-Amz-Signature=ab12&y=2#z", "https://a/b?X-Amz-Signature=***&y=2#z"),
        ("https://a/b?sv=1&sig=ab%2F12", "https://a/b?sv=1&sig=***"),
        ("https://TOKEN@host/x", "https://host/x"),
        ('{"a":"s3://K:S@b","c":"d@e"}', '{"a":"s3://b","c":"d@e"}'),
        # these have no secrets
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("gs://anonymous@bucket/x", "gs://anonymous@bucket/x"),
        ("models:/tiny@champion", "models:/tiny@champion"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("s3://bucket/a@b?region=us-east-1", "s3://bucket/a@b?region=us-east-1"),
        ("patches.key=1 token=2", "patches.key=1 token=2"),
    ],
)
def test_addresses_lose_their_secrets_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted_values({"a": [text, 1]}) == {"a": [shown, 1]}


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:{PASSWORD}@host")
    monkeypatch.setenv("HF_TOKEN", "short")
    monkeypatch.setenv("MY_PASSWORD", "12345678")
    assert redacted(f"a {SECRET} {quote(SECRET, safe='')} {PASSWORD}") == "a *** *** ***"
    assert redacted("short 12345678") == "short 12345678"


@pytest.mark.parametrize("kind", [UserError, CheckpointError])
def test_errors_have_no_secrets(kind: type[UserError]) -> None:
    error = kind(f"s3://{KEYS}@bucket is wrong")
    assert str(error) == "s3://bucket is wrong" == str(pickle.loads(pickle.dumps(error)))
    assert str(pickle.loads(pickle.dumps(StoreError(f"http://bob:{PASSWORD}@host", True)))) == "http://host"


def patchloom(monkeypatch: pytest.MonkeyPatch, *arguments: str, code: int = 0) -> None:
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", ["patchloom", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == code


def leaks(folder: Path) -> list[str]:
    """The files below a folder that contain a planted secret."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and any(mark.encode() in path.read_bytes() for mark in MARKS):
            found.append(str(path))
    return found


@pytest.mark.parametrize(
    "address", [f"postgresql://bob:{PASSWORD}@127.0.0.1:1/db", f"http://bob:{PASSWORD}@127.0.0.1:1"]
)
def test_chain_without_mlflow_leaks_no_password(
    address: str, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe(train__images=64, preview__every_images=0)))
    patchloom(monkeypatch, "train", "recipe.yaml", "--data", str(pixels), "--out", "run", "--workers", "0")
    patchloom(monkeypatch, "sample", "run", "samples", "--seeds", "0-1", "--steps", "2", "--workers", "0")
    patchloom(monkeypatch, "report", "run", "run.html")
    patchloom(monkeypatch, "models", "list", code=2)
    patchloom(monkeypatch, "models", "register", "run", "tiny", code=2)
    patchloom(monkeypatch, "demo", "--out", "demo", code=2)
    printed = capfd.readouterr()
    assert "127.0.0.1:1" in printed.out + printed.err
    assert not [mark for mark in MARKS if mark in printed.out + printed.err]
    assert leaks(tmp_path) == []


def test_chain_with_keys_in_every_address_leaks_none(
    s3: str, images: Path, pixels: Path, mlflow_store: Path, cache: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    there = f"{s3.replace('://', f'://{KEYS}@')}/{tmp_path.name}"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    source = Folder.at(f"{there}/images")
    for name in list(Folder.at(images).files())[::2]:  # of both classes
        source.put(images / name, name)
    recipe = tiny_recipe(train__images=64, preview__every_images=0)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(recipe))
    patchloom(monkeypatch, "prepare", f"{there}/images", f"{there}/data", "--resolution", "16", "--workers", "0")
    train = ["train", "recipe.yaml", "--data", f"{there}/data", "--workers", "0", "--out"]
    patchloom(monkeypatch, *train, f"{there}/run")
    patchloom(monkeypatch, *train, "here")
    again = [*train, "again", "--set", f"train.init_from={there}/run"]
    patchloom(monkeypatch, *again)
    patchloom(monkeypatch, *again, "--resume")
    patchloom(monkeypatch, "inspect", f"{there}/data")
    patchloom(monkeypatch, "models", "register", f"{there}/run", "planted", "--by-reference")
    patchloom(monkeypatch, "models", "register", "again", "planted")
    patchloom(monkeypatch, "models", "show", f"{there}/run")
    sample = ["--seeds", "0-3", "--steps", "2", "--workers", "0"]
    patchloom(monkeypatch, "sample", f"{there}/run", f"{there}/samples", *sample)
    patchloom(monkeypatch, "sample", f"{there}/run", "samples", *sample)
    evaluate = ["--features", "colours", "--workers", "0", "--reference", f"{there}/data"]
    patchloom(monkeypatch, "evaluate", f"{there}/samples", *evaluate)
    patchloom(monkeypatch, "report", f"{there}/run", "run.html")
    patchloom(monkeypatch, "report", f"{there}/samples", f"{there}/samples.html")
    patchloom(monkeypatch, "train", "recipe.yaml", "--data", f"{there}/nothing", "--out", "x", code=2)
    printed = capfd.readouterr()
    assert not [line for line in (printed.out + printed.err).splitlines() if any(mark in line for mark in MARKS)]
    written = Folder.at(f"{s3}/{tmp_path.name}")
    for number, name in enumerate(written.files()):
        written.fetch(name, tmp_path / "fetched" / str(number))
    assert number > 20
    assert leaks(tmp_path) + leaks(mlflow_store) + leaks(cache) == []


def test_traceback_of_a_failure_has_no_secrets(tmp_path: Path) -> None:
    code = "import patchloom.pipelines.cli.app as app; app.read_environment_file = 1/0 if 0 else None\n"
    code += f"app.exit_on_sigterm = lambda: (_ for _ in ()).throw(ValueError('http://bob:{PASSWORD}@host'))\n"
    code += "app.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert done.returncode and PASSWORD not in done.stdout and "ValueError" in done.stderr


def test_launch_refuses_a_command_with_keys() -> None:
    words = ["train", "recipe.yaml", "--data", f"s3://{KEYS}@bucket/data"]
    with pytest.raises(UserError, match="dashboard") as refused:
        launch(words, {}, LaunchOptions())
    assert not any(mark in str(refused.value) for mark in MARKS)


ESCAPE = "\x1b]0;owned\x07\x1b[2Jcat\r\u202e\x9b31m"


def test_terminal_escapes_in_names_are_shown_as_text(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    names = f"class {ESCAPE}", "other"
    for name, source in zip(names, sorted(images.iterdir()), strict=True):
        shutil.copytree(source, tmp_path / "images" / name)
    prepare = ["prepare", str(tmp_path / "images"), str(tmp_path / "data"), "--resolution", "16", "--workers", "0"]
    patchloom(monkeypatch, *prepare)
    patchloom(monkeypatch, "inspect", str(tmp_path / "data"))
    patchloom(monkeypatch, "inspect", str(tmp_path / f"no {ESCAPE}"), code=2)
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe(train__images=64, name=f"run {ESCAPE}")))
    train = ["train", str(tmp_path / "recipe.yaml"), "--data", str(tmp_path / "data"), "--workers", "0", "--out"]
    patchloom(monkeypatch, *train, str(tmp_path / "run"))
    patchloom(monkeypatch, "models", "show", str(tmp_path / "run"))
    patchloom(monkeypatch, "sample", str(tmp_path / "run"), str(tmp_path / "x"), "--label", ESCAPE, code=2)
    printed = "".join(capfd.readouterr())
    assert not [character for character in ESCAPE if character in printed and not character.isprintable()]
    assert "\\x1b]0;owned\\x07" in printed


def test_progress_bars_reach_the_terminal_behind_the_stream() -> None:
    written = io.StringIO()
    stream = RedactedStream(written, is_plain=True)
    stream.write("\x1b[31mname\x1b[0m\ttab\n")
    stream.rich_proxied_file.write("\x1b[2K")
    assert written.getvalue() == "\\x1b[31mname\\x1b[0m\ttab\n\x1b[2K"


def test_search_stores_no_secrets(pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, base = load_search("demo_pixels_search")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://bob:{PASSWORD}@host")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "")
    shared = search_job(search, base, open_dataset(pixels), Folder(str(tmp_path)), "run", 0)
    assert PASSWORD not in repr(shared) and PASSWORD.encode() not in pickle.dumps(shared)
    use_stores(shared.stores)  # a trial on this machine has the variable too
    assert tracking_uri() == registry_uri() == f"http://bob:{PASSWORD}@host"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "")
    use_stores(shared.stores)
    assert tracking_uri() == registry_uri() == "http://host"


def test_search_refuses_addresses_with_keys(pixels: Path, tmp_path: Path) -> None:
    for dataset, out in ((f"s3://{KEYS}@bucket/data", str(tmp_path / "x")), (str(pixels), f"s3://{KEYS}@bucket/x")):
        with pytest.raises(UserError, match="AWS_SECRET_ACCESS_KEY"):
            tune("demo_pixels_search", dataset, out)
    assert not (tmp_path / "x").exists()
