"""The commands of the quick start and of the how-to pages, run in the order of each page on tiny images.

A line runs as it is on the page, with less work: fewer seeds, steps and images, and in this process. `GIVEN` are the
inputs that a page expects, and `NOT_HERE` are the lines that need something else, with what tests them instead.
"""

import re
import runpy
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from command_lines import block_commands
from helpers import environment, photograph, tiny_recipe
from PIL import Image

from patchloom.models.backbones import ALLOWED
from patchloom.pipelines.cli.app import app
from patchloom.platform.recipe import recipe_yaml

pytestmark = [pytest.mark.slow, pytest.mark.ray]
DOCS = Path(__file__).parent.parent / "docs"
SUPPORT = Path(__file__).parent / "support"
CLASSES = ("cat", "chelsea", "dog")
SIDE = 32

NOT_HERE = {
    r"s3://": "needs a store: tests/pipelines/test_remote.py",
    r"patchloom-demo": "needs the demo: tests/pipelines/test_demo.py",
    r"stable-diffusion|train controlnet|conditions edges|edges-to-images": (
        "needs a base: tests/pipelines/train/test_controlnet.py"
    ),
    r"photographs pixels|autoencoder train pixels --out autoencoder|texts.npz|controlnet_search_cpu": (
        "takes long: tests/benchmarks/test_small_base.py"
    ),
    r"VIRTUAL_": "needs a published file: tests/pipelines/evaluate/test_evaluate.py",
    r"evaluate latents": "needs Inception: tests/pipelines/evaluate/test_evaluate.py",
    r"fid <|if-better|models rollback": "needs a history: tests/pipelines/registry/test_history.py",
    r"network-snapshot|models average": "needs other models: tests/pipelines/registry/test_convert.py",
    r"p_search_cpu --data pixels --out|my_search.yaml": "takes long: tests/pipelines/tune",
    r"sample MODEL drawn": "needs a model with conditions: the page control.md",
}
# words of a page that stand for something of the reader
NAMES = {"MODEL": "models:/my-model@champion", "FOLDER": "exported", "models:/my-model/4": "models:/my-model/1"}


def make_photos(folder: Path, count: int = 10, side: int = 48) -> None:
    """Crops of photographs in a folder for each class."""
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        pixels = photograph(("chelsea.png", "coffee.png", "astronaut.png")[number])
        for index in range(count):
            y, x = 2 * index, 4 * index
            Image.fromarray(pixels[y : y + side, x : x + side]).save(folder / name / f"{index:02d}.png")


def run(line: str) -> None:
    """Run a line of a page in this process."""
    typer.main.get_command(app)(with_less_work(shlex.split(line, comments=True)[1:]), standalone_mode=False)


def with_less_work(words: list[str]) -> list[str]:
    """A command line with fewer seeds, steps and images, in this process."""
    words = [NAMES.get(word, word) for word in words]
    command = words[0]
    if "--dry-run" in words:
        return words
    if command == "train" and "--resume" not in words and "own_network.yaml" not in words:
        keys = {"train.images": 64, "train.batch_size": 8, "model.width": 8, "train.checkpoint_every_images": 64}
        words += [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    if command == "train" and "--resume" in words:
        words = [re.sub(r"train\.images=\d+", "train.images=96", word) for word in words]
    words = limited(words, "--seeds", "0-3") if command == "sample" else words
    words = limited(words, "--steps", "3") if command == "sample" else words
    if command == "evaluate" and "--features" not in words:
        words += ["--features", "colours"]
    if command == "autoencoder":
        return [*words, "--images", "64"]
    if command in ("train", "sample", "evaluate", "prepare"):
        words = limited(words, "--workers", "0")
    return words


def limited(words: list[str], option: str, value: str) -> list[str]:
    """Words with another value of an option, which is added if it is missing."""
    if option not in words:
        return [*words, option, value]
    at = words.index(option) + 1
    return [*words[:at], value, *words[at + 1 :]]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder as the working directory, with MLflow's store in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ALLOWED, "")
    monkeypatch.syspath_prepend(str(SUPPORT))
    with environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path / 'mlflow.db'}"):
        yield tmp_path


def photos() -> None:
    if not Path("photos").exists():
        make_photos(Path("photos"))


def photographs() -> None:
    photos()
    shutil.make_archive("photos", "zip", "photos")
    lines = [f"{path.relative_to('photos')},{path.parent.name}" for path in sorted(Path("photos").rglob("*.png"))]
    Path("labels.csv").write_text("\n".join(["key,label", *lines]))
    Path("photographs").mkdir()
    Image.fromarray(photograph("chelsea.png")).save("photographs/chelsea.png")


def pixels(side: int = SIDE) -> None:
    photos()
    run(f"patchloom prepare photos pixels --resolution {side}")


def larger_pixels() -> None:
    pixels(2 * SIDE)


def trained() -> None:
    pixels()
    Path("recipe.yaml").write_text(recipe_yaml(tiny_recipe(train__images=64, train__checkpoint_every_images=64)))
    run("patchloom train recipe.yaml --data pixels --out run")


def registered() -> None:
    trained()
    run("patchloom models register run my-model --alias champion")
    Image.fromarray(photograph("chelsea.png")[:SIDE, :SIDE]).save("photo.png")
    mask = Image.new("L", (SIDE, SIDE), 255)
    mask.paste(0, (8, 8, 20, 20))
    mask.save("mask.png")


def sampled() -> None:
    registered()
    run("patchloom sample MODEL samples")


def with_features() -> None:
    make_photos(Path("photos"), count=80)  # so that some are held out
    sampled()
    for name in ("own_features", "own_metric"):
        runpy.run_path(str(SUPPORT / f"{name}.py"), run_name=name)


def with_drawings() -> None:
    photos()
    shutil.copytree("photos", "depth")
    run("patchloom prepare photos test_edges --resolution 64 --condition edges")
    Path("drawings").mkdir()
    for number in range(3):
        Image.new("L", (64, 64), 255 * (number % 2)).save(f"drawings/{number}.png")
    Path("recipe.yaml").write_text(recipe_yaml(tiny_recipe()))


def with_codec() -> None:
    photos()
    Path("my-codec").mkdir()
    card = re.search(r"```json\n(.*?)```", (DOCS / "how-to" / "own-autoencoder.md").read_text(), re.DOTALL)
    assert card
    Path("my-codec/model.json").write_text(card[1])


def with_network() -> None:
    pixels()
    shutil.copy(SUPPORT / "own_network.yaml", ".")


GIVEN: dict[str, Callable[[], None]] = {
    "quickstart.md": photos,
    "how-to/images.md": photographs,
    "how-to/latents.md": larger_pixels,
    "how-to/training.md": pixels,
    "how-to/control.md": with_drawings,
    "how-to/search.md": pixels,
    "how-to/registry.md": trained,
    "how-to/sampling.md": registered,
    "how-to/evaluation.md": sampled,
    "how-to/own-backbone.md": with_network,
    "how-to/own-autoencoder.md": with_codec,
    "how-to/own-metric.md": with_features,
    "extrapolation.md": registered,
}


@pytest.mark.parametrize("page", GIVEN)
def test_commands_of_a_page_run(page: str, world: Path) -> None:
    GIVEN[page]()
    lines = list(block_commands((DOCS / page).read_text()))
    here = [line for line in lines if not any(re.search(reason, line) for reason in NOT_HERE)]
    assert here
    for line in here:
        words = shlex.split(line, comments=True)[1:]
        for out in words[2:3] if words[0] == "sample" else [NAMES["FOLDER"]]:
            shutil.rmtree(out, ignore_errors=True)  # lines of a page are alternatives, with one name for their folder
        try:
            run(line)
        except BaseException as error:
            raise AssertionError(f"{page}: {line}: {error}") from error


def test_code_of_the_quick_start_and_the_readme_runs(world: Path) -> None:
    photos()
    for text in (DOCS.joinpath("quickstart.md").read_text(), DOCS.parent.joinpath("README.md").read_text()):
        code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
        code = code.replace("patchloom.evaluate", "# patchloom.evaluate").replace("0-63", "0-3")
        code = code.replace("workers=2", "workers=0").replace('"demo_pixels", "pixels"', 'recipe, "pixels"')
        code = re.sub(r"recipe = patchloom.load_recipe\(.*\n", "", code)
        for folder in ("pixels", "run", "samples"):
            shutil.rmtree(folder, ignore_errors=True)
        exec(code, {"recipe": tiny_recipe(train__images=64)})


def test_pages_that_do_not_run_are_of_clusters_and_servers() -> None:
    """Every how-to page with commands is run above, except those that need other machines or a server."""
    pages = {str(path.relative_to(DOCS)) for path in (DOCS / "how-to").glob("*.md")}
    assert pages - GIVEN.keys() == {"how-to/serving.md", "how-to/nightly.md"}  # tests/pipelines/serve, test_nightly.py
