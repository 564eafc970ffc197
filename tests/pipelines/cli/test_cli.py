"""The command line: what a user gets wrong is one clear line and exit code 2, and nothing is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import start_cli, tiny_recipe

from patchloom.pipelines.cli import main
from patchloom.platform.recipe import recipe_yaml


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "recipe.yaml").write_text(recipe_yaml(tiny_recipe()))
    return str(tmp_path / "recipe.yaml")


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["patchloom", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


MISTAKES = {
    "an empty folder": (["prepare", "{tmp}/empty", "{tmp}/out", "--resolution", "16"], "holds no image"),
    "no usable image": (["prepare", "{tmp}/bad", "{tmp}/out", "--resolution", "16"], "none of the 1 inputs"),
    "a missing source": (["prepare", "{tmp}/nowhere", "{tmp}/out", "--resolution", "16"], "does not exist"),
    "no resolution": (["prepare", "{images}", "{tmp}/out"], "--resolution is missing"),
    "an output below a file": (["prepare", "{images}", "{tmp}/file/out", "--resolution", "16"], "cannot be made"),
    "a demo among other files": (["demo", "--out", "{tmp}"], "is not empty and holds no demo"),
    "an autoencoder that is none": (
        ["prepare", "{pixels}", "{tmp}/out", "--autoencoder", "{tmp}/empty"],
        "holds no diffusion_pytorch_model.safetensors",
    ),
    "pixels prepared twice": (["prepare", "{pixels}", "{tmp}/out"], "give --autoencoder"),
    "a demo below a file": (["demo", "--out", "{tmp}/file/out"], "cannot be made"),
    "a run below a file": (["train", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/file/run"], "cannot be made"),
    "an unknown crop": (["prepare", "{images}", "{tmp}/out", "--resolution", "16", "--crop", "round"], "--crop round"),
    "an unknown recipe key": (
        ["train", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/out", "--set", "patches.pp=1"],
        "patches.pp: unknown key; did you mean p?",
    ),
    "p of 1.4": (
        ["train", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/out", "--set", "patches.p=1.4"],
        "patches.p: 1.4 is not within 0 and 1",
    ),
    "a missing dataset": (["train", "{recipe}", "--data", "{tmp}/nowhere", "--out", "{tmp}/out"], "does not exist"),
    "a dataset that is none": (
        ["train", "{recipe}", "--data", "{images}", "--out", "{tmp}/out"],
        "has no dataset.json",
    ),
    "an unknown recipe": (["train", "nonesuch", "--data", "{pixels}", "--out", "{tmp}/out"], "shipped"),
    "a search for a recipe": (["train", "demo_search", "--data", "{pixels}", "--out", "{tmp}/out"], "is a search"),
    "a recipe for a search": (["tune", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/out"], "is a recipe"),
    "no run folder": (["train", "{recipe}", "--data", "{pixels}"], "--out is missing"),
    "an unknown model name": (["sample", "models:/nonesuch@champion", "{tmp}/out"], "is not in the registry"),
    "an unknown version": (["sample", "models:/nonesuch/7", "{tmp}/out"], "is not in the registry"),
    "a folder that is no model": (["sample", "{tmp}/empty", "{tmp}/out"], "is no model"),
    "seeds that are none": (["sample", "{tmp}/empty", "{tmp}/out", "--seeds", "x"], "is not a seed"),
    "samples that are none": (["evaluate", "{tmp}/empty", "--reference", "{pixels}"], "holds no samples"),
    "a report of nothing": (["report", "{tmp}/empty", "{tmp}/out.html"], "is no run, search, samples or demo"),
    "a registration of nothing": (["models", "register", "{tmp}/empty", "name"], "is no run"),
    "an unknown command": (["paint"], "No such command 'paint'"),
    "an unknown option": (["train", "--fast"], "No such option"),
    "a missing argument": (["train"], "Missing"),
    "a number that is none": (["sample", "a", "b", "--steps", "many"], "--steps"),
    "an unknown sampler": (["sample", "{model}", "{tmp}/out", "--sampler", "magic"], "sampler: magic"),
    "an unknown ladder": (["sample", "{model}", "{tmp}/out", "--ladder", "rope"], "ladder: rope"),
    "churn without heun": (["sample", "{model}", "{tmp}/out", "--sampler", "ddim", "--churn", "9"], "churn: 9"),
    "a size that cannot be halved": (["sample", "{model}", "{tmp}/out", "--size", "17x16"], "multiples of 2"),
    "a size that is none": (["sample", "{model}", "{tmp}/out", "--size", "big"], "is not of the form HxW"),
    "levels that fall": (
        ["sample", "{model}", "{tmp}/out", "--guidance", "2", "--guidance-between", "5-1"],
        "guidance_between: 5-1",
    ),
    "a reference without a size": (["sample", "{model}", "{tmp}/out", "--outpaint", "a.png"], "give its --size"),
    "a reference that is too large": (
        ["sample", "{model}", "{tmp}/out", "--size", "8x8", "--outpaint", "{images}/coffee/00.png"],
        "cannot stand in the middle",
    ),
    "an import of nothing": (["models", "import", "{tmp}/none.pkl", "{tmp}/out"], "is not a file"),
    "an import of a text": (["models", "import", "{tmp}/file", "{tmp}/out"], "is not a whole pickle"),
    "an export over a folder": (["models", "export", "{model}", "{tmp}/bad"], "is not empty"),
    "an average of nothing": (
        ["models", "average", "{tmp}/empty", "{tmp}/out", "--sigma-rel", "0.1"],
        "no finished run",
    ),
    "an average that was not kept": (
        ["models", "average", "{model}/..", "{tmp}/out", "--sigma-rel", "0.1"],
        "kept no averages",
    ),
    "ranks without their draw": (
        ["train", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/out", "--set", "train.emulated_ranks=2"],
        "set patches.draw: independent",
    ),
    "a stratified step without room": (
        ["train", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/out", "--set", "patches.draw=stratified"],
        "raise train.batch_size or lower train.block_size",
    ),
    "a progressive mix": (
        [
            "train",
            "{recipe}",
            "--data",
            "{pixels}",
            "--out",
            "{tmp}/out",
            "--set",
            "patches.schedule=progressive",
            "--set",
            "patches.draw=stratified",
        ],
        "one size at a time",
    ),
    "a network from nowhere": (
        ["train", "{tmp}/own.yaml", "--data", "{pixels}", "--out", "{tmp}/out"],
        "give --allow-backbone somebody",
    ),
    "an allowed network that is not there": (
        ["train", "{tmp}/own.yaml", "--data", "{pixels}", "--out", "{tmp}/out", "--allow-backbone", "somebody"],
        "cannot be imported",
    ),
    "a store of an unknown kind": (["sample", "{model}", "nosuch://bucket/samples"], "no file system is known"),
}


@pytest.mark.ray
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(
    mistake: str, images: Path, pixels: Path, recipe: str, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("not an image")
    (tmp_path / "file").write_text("a regular file")
    (tmp_path / "own.yaml").write_text("name: own\nmodel: {backbone: 'somebody.nets:Net'}\ntrain: {images: 100}\n")
    monkeypatch.setenv("PATCHLOOM_ALLOW_BACKBONE", "")
    arguments, words = MISTAKES[mistake]
    places = {"tmp": tmp_path, "images": images, "pixels": pixels, "recipe": recipe, "model": trained / "model"}
    capsys.readouterr()
    assert run_main(monkeypatch, *(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("patchloom: ") and error.count("\n") == 1, error
    assert words in error
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.ray
def test_a_text_file_among_images_is_skipped_and_the_exit_code_is_0(
    images: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "prepare", str(images), str(tmp_path / "out"), "--resolution", "16") == 0
    assert "48 rows + 1 skipped = 49 inputs" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from patchloom.errors import UserError\n"
        "from patchloom.platform.files.storage import make_folder\n"
        "os.setgid(65534); os.setuid(65534)\n"
        f"try: make_folder(Path({str(tmp_path / 'out')!r}))\n"
        "except UserError as error: print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "cannot be made (Permission denied)" in done.stdout


@pytest.mark.ray
def test_dry_runs_print_what_would_be_and_write_nothing(
    pixels: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run_main(monkeypatch, "train", recipe, "--data", str(pixels), "--dry-run") == 0
    words = capsys.readouterr().out
    assert "39 updates, 593 counted images (crops), 156 full-size images" in words
    assert all(size in words for size in ("16px", "8px", "4px", "GFLOP", "MiB"))
    assert run_main(monkeypatch, "tune", "demo_pixels_search", "--data", str(pixels), "--dry-run") == 0
    assert "4 trials" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.ray
def test_inspect_prints_the_card_and_notices_a_changed_byte(
    images: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    run_main(monkeypatch, "prepare", str(images), str(data), "--resolution", "8")
    capsys.readouterr()
    assert run_main(monkeypatch, "inspect", str(data)) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 48
    shard = data / "shards" / "part-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run_main(monkeypatch, "inspect", str(data)) == 2
    assert "sha256" in capsys.readouterr().err


@pytest.mark.ray
def test_the_registry_is_listed_shown_and_promoted(
    champion: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "models", "promote", "tiny", "1", "--alias", "candidate") == 0
    assert run_main(monkeypatch, "models", "list") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny/1"))
    assert "candidate,champion" in line and "stochastic" in line
    assert run_main(monkeypatch, "models", "show", champion) == 0
    assert "classes: chelsea, coffee" in capsys.readouterr().out
    assert run_main(monkeypatch, "models", "promote", "tiny", "9") == 2


def test_every_command_explains_itself_with_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = ["demo", "prepare", "inspect", "autoencoder train", "train", "tune", "models register", "models show",
                "models import", "models export", "models average", "sample", "evaluate", "report"]  # fmt: skip
    for command in commands:
        assert run_main(monkeypatch, *command.split(), "--help") == 0
        words = " ".join(capsys.readouterr().out.split())
        assert f"Example: patchloom {command}" in words


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['patchloom', '--help']\n"
        "from patchloom.pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'ray', 'mlflow', 'diffusers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.ray
def test_a_newcomers_terminal_shows_our_words_alone(images: Path, tmp_path: Path) -> None:
    process = start_cli("prepare", str(images), "out", "--resolution", "16", cwd=tmp_path)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    lines = [line for line in output.splitlines() if line.strip()]
    ours = ("  starting Ray on this machine", "  preparing: ", "48 rows + 1 skipped = 49 inputs in ")
    assert all(line.startswith(ours) for line in lines), output
