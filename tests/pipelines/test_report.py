"""Reports: pages that stand alone, with pictures that open and the numbers of the folder."""

import base64
import io
import re
import shlex
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from command_lines import parse
from PIL import Image

from patchloom.errors import UserError
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.evaluate.page import evaluate_command, sample_command
from patchloom.pipelines.report import report
from patchloom.pipelines.reproduce.reproducing import reproduce_command
from patchloom.pipelines.sample import sample
from patchloom.pipelines.train.page import train_command
from patchloom.platform.files.storage import each_json_line, make_folder, read_json, write_json
from patchloom.platform.records.evaluation import EvaluationResult
from patchloom.platform.records.reproduction import Reproduction
from patchloom.platform.records.samples import ManifestEntry, SamplingCard

pytestmark = pytest.mark.ray


class Page(HTMLParser):
    """What a browser would load: the pictures, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name == "src"]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_runs_page_stands_alone_and_shows_its_counts(trained: Path, tmp_path: Path) -> None:
    page = Page(report(str(trained), str(tmp_path / "run.html")).read_text())
    assert page.open == []
    previews = [line for line in each_json_line(trained / "progress.jsonl") if "preview" in line]
    assert len(page.sources) == len(previews) > 0
    for source in page.sources:
        assert source.startswith("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
            assert picture.size == (4 * 18 - 2, 16)
    last = list(each_json_line(trained / "progress.jsonl"))[-1]
    assert {f"{last['step']:,}", f"{last['images_seen']:,}", f"{last['full_size_images']:,}"} <= set(page.words)


def test_a_page_of_samples_shows_their_numbers_and_neighbours(champion: str, pixels: Path, tmp_path: Path) -> None:
    folder = sample(champion, str(tmp_path / "samples"), "0-5", steps=2).folder
    assert "Not measured yet" in report(str(folder), str(tmp_path / "page.html")).read_text()
    result = evaluate(str(folder), str(pixels), features="colours")
    page = Page(report(str(folder), str(tmp_path / "page.html")).read_text())
    assert page.open == [] and len(page.sources) == 3  # contact sheet, nearest neighbours, densities
    assert {
        f"{result['metrics']['frechet_distance']:.4g}",
        "Fréchet distance (lower is better)",
        "0-5",
        "colour-layout-48",
    } <= set(page.words)


def test_a_runs_page_shows_its_data_and_needs_no_dataset(trained: Path, tmp_path: Path) -> None:
    """A damaged or missing dataset leaves out its rows and classes."""
    run, card = shutil.copytree(trained, tmp_path / "run"), read_json(trained / "run.json")
    shutil.copytree(card["dataset"], tmp_path / "data")
    write_json(run / "run.json", card | {"dataset": str(tmp_path / "data")})
    page = report(str(run), str(tmp_path / "run.html"))
    assert "2 classes: " in page.read_text()
    for damage in (lambda: (tmp_path / "data" / "dataset.json").write_text('{"format_version": 999}'),
                   lambda: (tmp_path / "data" / "dataset.json").write_text("{"),
                   lambda: shutil.rmtree(tmp_path / "data")):  # fmt: skip
        damage()
        text = report(str(run), str(page)).read_text()
        assert str(tmp_path / "data") in text and "2 classes" not in text


@pytest.mark.parametrize(
    ("server", "address"),
    [("https://me:secret@host:5000/", "host:5000"), ("sqlite:///mlflow.db", ""), ("javascript:alert(1)", "")],
)
def test_a_runs_page_links_its_run_on_a_server(server: str, address: str, trained: Path, tmp_path: Path) -> None:
    run, card = shutil.copytree(trained, tmp_path / "run"), read_json(trained / "run.json")
    write_json(run / "run.json", card | {"tracking_uri": server, "run_id": "a1b2"})
    text = report(str(run), str(tmp_path / "run.html")).read_text()
    links = [urlsplit(link) for link in re.findall(r'<a href="([^"]*)"><code>a1b2', text)]
    assert [(link.netloc.rpartition("@")[2], link.fragment) for link in links] == (
        [(address, "/runs/a1b2")] if address else []
    )
    assert "secret" not in text


def test_a_runs_page_shows_every_number_that_is_counted(trained: Path, tmp_path: Path) -> None:
    words = Page(report(str(trained), str(tmp_path / "run.html")).read_text()).words
    pairs = list(zip(words[1:], words, strict=False))  # a number stands before its name
    shown = dict(reversed(pairs))  # the first one: names are repeated below with their meanings
    lines = list(each_json_line(trained / "progress.jsonl"))
    last = lines[-1]

    def middle(key: str) -> float:
        return statistics.median(line[key] for line in lines if key in line)

    assert shown["images by pixels"] == f"{last['pixel_equivalent_images']:,.0f}"
    assert shown["TFLOP"] == f"{last['flops'] / 1e12:,.1f}"
    assert "left to go" not in shown  # of a finished run
    assert shown["time lost to the slowest worker"] == f"{middle('straggler_loss'):.1%}" == "0.0%"  # of one worker
    assert shown["waiting for data"] == f"{middle('data_wait_share'):.1%}"
    assert shown["peak memory"] == f"{last['peak_memory_bytes'] / 2**30:,.2f} GiB"
    (utilisation,) = (name for name in shown if name.startswith("model FLOPs utilisation, of "))
    assert "(measured)" in utilisation and shown[utilisation] == f"{middle('model_flops_utilisation'):.1%}"
    for size in ("16", "8", "4"):
        rates = [line["images_per_second_by_patch_size"].get(size) for line in lines]
        wanted = statistics.median(rate for rate in rates if rate is not None)
        assert shown[f"images/s of {size} x {size}"] == f"{wanted:,.0f}"


def checked_command(line: str) -> list[str]:
    """The words of a command that the command line accepts."""
    words = shlex.split(line)
    parse(words[1:])
    return words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["--batch=8"]),
        ({"steps": 9, "size": [96, 128], "churn": 2.0, "churn_between": [0.3, 5.0]},
         ["--steps=9", "--churn=2.0", "--size=96x128", "--churn-between=0.3-5.0", "--batch=8"]),
        ({"guidance": -1.5, "labels": "fixed", "label": 3, "format": "zip", "shard_size": 50},
         ["--guidance=-1.5", "--label=3", "--format=zip", "--shard-size=50", "--batch=8"]),
        ({"labels": "file", "inpaint": {"sha256": "a", "mask_sha256": "b", "method": "resample"}},
         ["--labels=LABELS", "--inpaint=IMAGE", "--mask=MASK", "--outpaint-method=resample", "--batch=8"]),
    ],
)  # fmt: skip
def test_samples_have_the_command_that_makes_them(options: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    sampling = {"sampler": "heun", "steps": 18, "guidance": 1.0, "churn": 0.0, "size": None} | options
    card = {
        "format_version": 1,
        "kind": "samples",
        "model": {"reference": "models:/a/1", "weights_sha256": "c"},
        "network_evaluations": 35,
        "labels": "balanced",
        "label": None,
        "outpaint": None,
        "format": "png",
        "shard_size": None,
        "batch": 8,
        "threads": 1,
        "lineage": {"run_id": None, "name": "a", "version": "1"},
    }
    place = make_folder(tmp_path / "samples")
    entries = [ManifestEntry(seed=seed, label=0, file="a", sha256="d").to_json() for seed in (0, 1, 2, 7)]
    (place / "manifest.jsonl").write_text("\n".join([*entries, ""]))
    line = sample_command(SamplingCard.model_validate(card | sampling), place, "samples")
    assert checked_command(line)[:6] == ["patchloom", "sample", "models:/a/1", "samples-again", "--seeds", "0-2,7"]
    assert checked_command(line)[6:] == words


def test_an_evaluation_has_its_command(tmp_path: Path) -> None:
    identity = {"features": "colour-layout-48", "n_samples": 4, "reference": "a"}
    result = EvaluationResult.model_validate({"metrics": {}, "identity": identity, "digest": "a"})
    words = ["patchloom", "evaluate", "samples", "--reference", "REFERENCE", "--features", "colours"]
    assert checked_command(evaluate_command(result, "samples")) == words
    line = "patchloom evaluate a --reference b"
    assert evaluate_command(result.model_copy(update={"command": line}), "samples") == line


def test_a_run_and_a_reproduction_have_their_commands(trained: Path) -> None:
    words = checked_command(train_command(trained))  # a function trained it
    assert words[:4] == ["patchloom", "train", f"{trained.name}/recipe.yaml", "--data"] and Path(words[4]).is_dir()
    for table, options in {"table4": [], "samplers": ["--features", "colours"]}.items():  # the first refuses features
        asked = Reproduction(table=table, small=True, data={"celeba": "faces.zip"}, features="colours")
        words = ["patchloom", "reproduce", table, "--small", "--out", "again", "--data", "celeba=faces.zip"]
        assert checked_command(reproduce_command(asked, "again")) == [*words, *options]


def test_a_folder_in_the_pages_place_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        report(str(trained), str(tmp_path))
