"""The command line: a mistake of the user is one line and exit code 2, and nothing is written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


PREPARE = ["--resolution", "16"]
TRAIN = ["train", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/out"]
SAMPLE = ["sample", "{model}", "{tmp}/out"]
# what was typed, and the values that the message names
MISTAKES = {
    "empty source": (["prepare", "{tmp}/empty", "{tmp}/out", *PREPARE], ["{tmp}/empty"]),
    "no usable image": (["prepare", "{tmp}/bad", "{tmp}/out", *PREPARE], ["1 input"]),
    "missing source": (["prepare", "{tmp}/nowhere", "{tmp}/out", *PREPARE], ["{tmp}/nowhere"]),
    "no resolution": (["prepare", "{images}", "{tmp}/out"], ["--resolution"]),
    "output below a file": (["prepare", "{images}", "{tmp}/file/out", *PREPARE], ["{tmp}/file/out"]),
    "demo in a folder with other files": (["demo", "--out", "{tmp}"], ["{tmp}", "--out"]),
    "autoencoder folder without weights": (
        ["prepare", "{pixels}", "{tmp}/out", "--autoencoder", "{tmp}/empty"],
        ["{tmp}/empty", "diffusion_pytorch_model.safetensors"],
    ),
    "pixels prepared again as pixels": (["prepare", "{pixels}", "{tmp}/out"], ["--autoencoder"]),
    "demo below a file": (["demo", "--out", "{tmp}/file/out"], ["{tmp}/file/out"]),
    "run below a file": (["train", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/file/run"], ["{tmp}/file/run"]),
    "unknown crop": (["prepare", "{images}", "{tmp}/out", *PREPARE, "--crop", "round"], ["--crop round"]),
    "unknown recipe key": ([*TRAIN, "--set", "patches.pp=1"], ["patches.pp", "mean p?"]),
    "p of 1.4": ([*TRAIN, "--set", "patches.p=1.4"], ["patches.p", "1.4"]),
    "missing dataset": (["train", "{recipe}", "--data", "{tmp}/nowhere", "--out", "{tmp}/out"], ["{tmp}/nowhere"]),
    "folder without a dataset": (
        ["train", "{recipe}", "--data", "{images}", "--out", "{tmp}/out"],
        ["{images}", "dataset.json"],
    ),
    "unknown recipe": (
        ["train", "nonesuch", "--data", "{pixels}", "--out", "{tmp}/out"],
        ["nonesuch", "patchloom recipes"],
    ),
    "search given as a recipe": (
        ["train", "demo_search", "--data", "{pixels}", "--out", "{tmp}/out"],
        ["demo_search", "patchloom tune"],
    ),
    "recipe given as a search": (
        ["tune", "{recipe}", "--data", "{pixels}", "--out", "{tmp}/out"],
        ["{recipe}", "patchloom train"],
    ),
    "no run folder": (["train", "{recipe}", "--data", "{pixels}"], ["--out"]),
    "unknown model name": (["sample", "models:/nonesuch@champion", "{tmp}/out"], ["models:/nonesuch@champion"]),
    "unknown version": (["sample", "models:/nonesuch/7", "{tmp}/out"], ["models:/nonesuch/7"]),
    "folder without a model": (["sample", "{tmp}/empty", "{tmp}/out"], ["{tmp}/empty"]),
    "invalid seeds": (["sample", "{tmp}/empty", "{tmp}/out", "--seeds", "x"], ["x"]),
    "folder without samples": (["evaluate", "{tmp}/empty", "--reference", "{pixels}"], ["{tmp}/empty"]),
    "report of an empty folder": (["report", "{tmp}/empty", "{tmp}/out.html"], ["{tmp}/empty"]),
    "registering an empty folder": (["models", "register", "{tmp}/empty", "name"], ["{tmp}/empty", "patchloom train"]),
    "unknown command": (["paint"], ["paint", "patchloom --help"]),
    "unknown option": (["train", "--fast"], ["--fast", "patchloom train --help"]),
    "missing argument": (["train"], ["patchloom train --help"]),
    "text where a number belongs": (["sample", "a", "b", "--steps", "many"], ["--steps"]),
    "unknown sampler": ([*SAMPLE, "--sampler", "magic"], ["magic", "heun"]),
    "unknown ladder": ([*SAMPLE, "--ladder", "rope"], ["rope", "karras"]),
    "churn without heun": ([*SAMPLE, "--sampler", "ddim", "--churn", "9"], ["churn", "heun", "ddim"]),
    "size that the network cannot halve": ([*SAMPLE, "--size", "17x16"], ["17", "multiples of 2"]),
    "invalid size": ([*SAMPLE, "--size", "big"], ["big", "HxW"]),
    "guidance interval in falling order": ([*SAMPLE, "--guidance", "2", "--guidance-between", "5-1"], ["5-1"]),
    "outpainting without a size": ([*SAMPLE, "--outpaint", "a.png"], ["--outpaint", "--size"]),
    "outpainting into a smaller size": (
        [*SAMPLE, "--size", "8x8", "--outpaint", "{images}/coffee/00.png"],
        ["{images}/coffee/00.png", "16x16", "8x8"],
    ),
    "import of a missing file": (["models", "import", "{tmp}/none.pkl", "{tmp}/out"], ["{tmp}/none.pkl"]),
    "import of a text file": (["models", "import", "{tmp}/file", "{tmp}/out"], ["{tmp}/file"]),
    "export over a folder": (["models", "export", "{model}", "{tmp}/bad"], ["{tmp}/bad"]),
    "average of an empty folder": (
        ["models", "average", "{tmp}/empty", "{tmp}/out", "--sigma-rel", "0.1"],
        ["{tmp}/empty"],
    ),
    "average of a run without snapshots": (
        ["models", "average", "{run}", "{tmp}/out", "--sigma-rel", "0.1"],
        ["{run}", "snapshot_every_images"],
    ),
    "emulated ranks with a shared draw": (
        [*TRAIN, "--set", "train.emulated_ranks=2"],
        ["train.emulated_ranks", "patches.draw: independent"],
    ),
    "batch too small for a stratified step": (
        [*TRAIN, "--set", "patches.draw=stratified"],
        ["patches.draw", "train.batch_size", "train.block_size"],
    ),
    "progressive schedule with a stratified draw": (
        [*TRAIN, "--set", "patches.schedule=progressive", "--set", "patches.draw=stratified"],
        ["progressive", "stratified"],
    ),
    "network of a package that is not allowed": (
        ["train", "{tmp}/own.yaml", "--data", "{pixels}", "--out", "{tmp}/out"],
        ["--allow-backbone somebody"],
    ),
    "network of a package that is not installed": (
        ["train", "{tmp}/own.yaml", "--data", "{pixels}", "--out", "{tmp}/out", "--allow-backbone", "somebody"],
        ["somebody"],
    ),
    "address of an unknown file system": (["sample", "{model}", "nosuch://bucket/samples"], ["nosuch"]),
}


@pytest.mark.ray
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line_with_exit_code_2(
    mistake: str, images: Path, pixels: Path, recipe: str, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("not an image")
    (tmp_path / "file").write_text("a regular file")
    (tmp_path / "own.yaml").write_text("name: own\nmodel: {backbone: 'somebody.nets:Net'}\ntrain: {images: 100}\n")
    monkeypatch.setenv("PATCHLOOM_ALLOW_BACKBONE", "")
    arguments, named = MISTAKES[mistake]
    places = {"tmp": tmp_path, "images": images, "pixels": pixels, "recipe": recipe, "run": trained,
              "model": trained / "model"}  # fmt: skip
    capsys.readouterr()
    assert run_main(monkeypatch, *(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("patchloom: ") and error.count("\n") == 1, error
    assert [value for value in named if value.format(**places) not in error] == [], error
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.ray
def test_text_file_among_images_is_skipped_with_exit_code_0(
    images: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "prepare", str(images), str(tmp_path / "out"), "--resolution", "16") == 0
    assert "48 rows + 1 skipped = 49 inputs" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to a user without permissions")
def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
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
    assert str(tmp_path / "out") in done.stdout and "Permission denied" in done.stdout


@pytest.mark.ray
def test_dry_run_prints_the_plan_and_writes_nothing(
    pixels: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert run_main(monkeypatch, "train", recipe, "--data", str(pixels), "--dry-run") == 0
    words = capsys.readouterr().out
    assert all(f"{count} " in words for count in ("39", "593", "156"))  # updates, crops, full-size images
    assert all(size in words for size in ("16px", "8px", "4px", "GFLOP", "MiB"))
    assert run_main(monkeypatch, "tune", "demo_pixels_search", "--data", str(pixels), "--dry-run") == 0
    assert "6 trials" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == before


def test_like_replaces_a_dataset_in_dry_runs_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "train", "celeba64", "--dry-run", "--like", "64x64x3") == 0
    assert "61,806,723" in capsys.readouterr().out
    conditional = ("train", "demo_latents", "--dry-run", "--like", "16x16x4")
    assert run_main(monkeypatch, *conditional, "--like-classes", "6") == 0
    edges = ("train", "edges_small", "--dry-run", "--like", "32x32x3", "--like-condition", "1")
    assert run_main(monkeypatch, *edges) == 0
    for wrong in (
        conditional,
        ("train", "celeba64", "--like", "64x64x3", "--out", "run"),
        ("train", "celeba64", "--like", "64x64x3", "--data", "data", "--dry-run"),
        ("train", "celeba64", "--like-classes", "6", "--data", "data", "--dry-run"),
        ("train", "celeba64", "--like-condition", "1", "--data", "data", "--dry-run"),
        ("train", "celeba64", "--dry-run"),
        ("tune", "p_search", "--like", "64x64x3", "--out", "search"),
        ("tune", "p_search", "--out", "search"),
    ):
        assert run_main(monkeypatch, *wrong) == 2
        said = capsys.readouterr().err
        assert "--like" in said or "--data" in said


def test_dry_runs_print_their_numbers_as_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def numbers(*command: str) -> Any:
        assert run_main(monkeypatch, *command, "--dry-run", "--json") == 0
        return json.loads(capsys.readouterr().out)

    training = numbers("train", "celeba64", "--like", "64x64x3")
    assert training["parameters"] == 61_806_723 and training["split_rows"] is None
    assert training["flops"] == sum(size["crops"] * size["flops_per_crop"] for size in training["sizes"])
    search = numbers("tune", "schedule_search", "--like", "64x64x3")
    assert search["trials"] == 8 and search["settings"] == len(search["of_settings"]) == 4
    assert search["flops"] == pytest.approx(8 * 2e18, rel=1e-3) and search["seconds"] is None
    figure = numbers("reproduce", "figure2", "--small")
    assert figure["flops"] == sum(stage["flops"] for stage in figure["stages"]) > 0
    assert all(found["plan"] for found in (training, search, figure))


@pytest.mark.ray
def test_inspect_prints_the_card_and_detects_a_changed_byte(
    images: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    run_main(monkeypatch, "prepare", str(images), str(data), "--resolution", "8")
    capsys.readouterr()
    assert run_main(monkeypatch, "inspect", str(data), "--json") == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 48
    assert run_main(monkeypatch, "inspect", str(data)) == 0
    summary = capsys.readouterr().out
    assert "48 rows + 1 skipped = 49 inputs" in summary and "{" not in summary
    shard = data / "shards" / "part-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run_main(monkeypatch, "inspect", str(data)) == 2
    assert "sha256" in capsys.readouterr().err


@pytest.mark.ray
def test_models_list_show_and_promote(
    champion: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "models", "promote", "tiny", "1", "--alias", "candidate") == 0
    assert run_main(monkeypatch, "models", "list") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny/1"))
    assert "candidate,champion" in line and "stochastic" in line
    assert run_main(monkeypatch, "models", "show", champion) == 0
    assert "classes: chelsea, coffee" in capsys.readouterr().out
    assert run_main(monkeypatch, "models", "promote", "tiny", "9") == 2


def test_help_of_every_command_has_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = ["demo", "prepare", "inspect", "autoencoder train", "train", "tune", "models register", "models show",
                "models import", "models export", "models average", "models list", "models compare", "models promote",
                "models delete", "models relocate", "models history", "models rollback", "models prune",
                "sample", "evaluate", "report", "benchmark", "doctor"]  # fmt: skip
    for command in commands:
        assert run_main(monkeypatch, *command.split(), "--help") == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"Example: $ patchloom {command}" in " ".join(" ".join(lines).split())
        assert max(map(len, lines)) <= 80


def test_help_of_groups_has_whole_summaries_in_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for group in ([], ["models"], ["launch"], ["cache"], ["autoencoder"]):
        assert run_main(monkeypatch, *group, "--help") == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        assert [line for line in lines if line.endswith("...")] == [line for line in lines if line.startswith("Usage:")]
        assert sum("$ patchloom" in line for line in lines) >= 2


def test_help_imports_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['patchloom', '--help']\n"
        "from patchloom.pipelines.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('torch', 'ray', 'mlflow', 'diffusers', 'numpy', 'pyarrow', 'pydantic')\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


@pytest.mark.ray
def test_terminal_shows_only_messages_of_patchloom(images: Path, tmp_path: Path) -> None:
    process = start_cli("prepare", str(images), "out", "--resolution", "16", cwd=tmp_path)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    lines = [line for line in output.splitlines() if line.strip()]
    ours = (
        "  starting Ray on this machine",
        "  classes: ",
        "  preparing: ",
        "  skipped ",
        "48 rows + 1 skipped = 49 inputs in ",
    )
    assert all(line.startswith(ours) for line in lines), output
