"""The store fails at the last step of a command that writes there: nothing is lost, and the next call finishes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from faulty_proxy import FaultyProxy
from helpers import environment, names_in, start_cli, tiny_recipe

from patchloom.platform.files.folder import Folder
from patchloom.platform.recipe import recipe_yaml

pytestmark = pytest.mark.slow

SEARCH = {
    "name": "p", "recipe": "recipe.yaml", "space": {"patches.p": {"grid": [0.5]}},
    "budget": {"images": 64}, "set": {"preview.every_images": 0},
}  # fmt: skip
HERE = ["--workers", "0"]
# the arguments, the file at which the store fails, a part of the names of files that are work, what continues
COMMANDS = {
    "prepare": (["prepare", "IMAGES", "OUT", "--resolution", "16", *HERE], "dataset.json", ".arrow", []),
    "sample": (["sample", "RUN", "OUT", "--seeds", "0-7", "--steps", "2", *HERE], "manifest.jsonl", "/000000/", []),
    "sample-npz": (
        ["sample", "RUN", "OUT", "--seeds", "0-7", "--steps", "2", "--format", "npz", *HERE], "manifest.jsonl",
        "/000000.npz",
        [],
    ),
    "evaluate": (
        ["evaluate", "SAMPLES", "--reference", "DATA", "--features", "colours", "--out", "OUT/metrics.json", *HERE],
        "metrics.json", ".npy", [],
    ),
    "report": (["report", "RUN", "OUT/report.html"], "report.html", ".none", []),
    "autoencoder": (
        ["autoencoder", "train", "DATA", "--out", "OUT", "--widths", "8,8", "--images", "64", "--patch", "8", *HERE],
        "config.json", "/checkpoint.json", [],
    ),
    "tune": (["tune", "search.yaml", "--data", "DATA", "--out", "OUT"], "best.yaml", "/checkpoint.json", ["--restore"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def proxy(s3: str, s3_environment: str) -> Iterator[FaultyProxy]:
    """The store behind a proxy, for commands that do not wait long for it."""
    with FaultyProxy(s3_environment) as proxy, environment(AWS_ENDPOINT_URL=proxy.address, PATCHLOOM_STORE_WAIT_S="2"):
        yield proxy


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node with a cache of its own, a recipe and a search."""
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATCHLOOM_FENCE_EXPIRES_S", "4")
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe()))
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_the_next_call_ends_what_an_outage_stopped(
    command: str, proxy: FaultyProxy, s3: str, images: Path, pixels: Path, trained: Path, node: Path
) -> None:
    arguments, last_file, work, continues = COMMANDS[command]
    samples = Folder.at(f"{s3}/last-steps/{command}-samples")
    places = {"IMAGES": str(images), "DATA": str(pixels), "RUN": str(trained), "SAMPLES": str(samples)}

    def run(out: str, *more: str) -> tuple[int, str]:
        given = [places.get(argument, argument.replace("OUT", out)) for argument in arguments]
        process = start_cli(*given, *more, cwd=node)
        said = process.communicate(timeout=300)[0]
        return process.returncode, said

    if command == "evaluate":
        make = ["sample", str(trained), str(samples), "--seeds", "0-7", "--steps", "2", *HERE]
        assert start_cli(*make, cwd=node).wait() == 0
    out = Folder.at(f"{s3}/last-steps/{command}")
    proxy.fails_at, proxy.written = last_file, []
    code, said = run(str(out))
    assert code == 2, said
    assert str(out) in said.splitlines()[-1] and "Traceback" not in said
    done = {name for name in proxy.written if work in name}
    assert done or command == "report"
    proxy.fails_at, proxy.written = None, []
    proxy.set("ok")
    code, said = run(str(out), *continues)
    assert code == 0, said
    assert not done & set(proxy.written)  # nothing was made again
    assert any(name.endswith(last_file) for name in out.files())
    if command in ("prepare", "sample", "sample-npz"):
        whole = node / "whole"
        assert run(str(whole))[0] == 0
        names = [name for name in names_in(whole) if "sampling" not in name]
        assert {name: out.read(name) for name in names} == {name: (whole / name).read_bytes() for name in names}
