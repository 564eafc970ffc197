"""Model cards of exported models: the Hugging Face Hub can read them, their numbers are measured, their code runs."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard as HubCard
from PIL import Image

from patchloom.errors import UserError
from patchloom.models.cards import ConditionCard, DenoiserConfig
from patchloom.models.cards import ModelCard as Card
from patchloom.models.checkpoints import read_card
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.registry.convert import export_model, import_model
from patchloom.pipelines.registry.hub_card import write_hub_card
from patchloom.pipelines.registry.registering import register
from patchloom.pipelines.sample import sample
from patchloom.platform.tracking.registry import FetchedModel


def code_blocks(card: HubCard) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card.text, re.DOTALL))


def test_a_version_is_exported_with_its_metrics_and_samples(
    trained: Path, pixels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = register(str(trained), "carded")
    samples = sample(reference, str(tmp_path / "samples"), "0-7", steps=2, workers=0).folder
    measured = evaluate(str(samples), str(pixels), features="colours", workers=0)["metrics"]
    folder = export_model(reference, str(tmp_path / "exported"), license_id="cc-by-4.0")
    card = HubCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert [card.data.to_dict()[key] for key in ("license", "library_name")] == ["cc-by-4.0", "patchloom"]
    assert card.data.pipeline_tag == "unconditional-image-generation" and card.data.model_name == "carded"
    found = {result.metric_type: result for result in card.data.eval_results or []}
    assert found["frechet_distance"].metric_value == measured["frechet_distance"]
    assert set(found) == set(card.data["metrics"]) == {name for name in found if np.isfinite(measured[name])}
    assert {result.metric_args["n"] for result in found.values()} == {8}
    row = f"{measured['frechet_distance']:.4g} | 8 |"
    assert row in card.text
    preview = sorted((trained / "previews").glob("*.png"))[-1]
    assert "(samples.png)" in card.text and (folder / "samples.png").read_bytes() == preview.read_bytes()

    monkeypatch.chdir(folder)
    values: dict[str, object] = {}
    exec(compile(code_blocks(card), "README.md", "exec"), values)
    images, denoiser = values["images"], values["denoiser"]
    assert isinstance(images, np.ndarray) and images.shape == (4, 16, 16, 3)
    assert getattr(denoiser, "resolution", None) == 16
    again = sample(".", str(tmp_path / "again"), "0-3", steps=18, workers=0).folder  # the command in the card
    with Image.open(Path(again) / "000000" / "000002.png") as image:
        assert np.array_equal(np.asarray(image), images[2])


def test_a_run_and_an_edited_card_are_exported(trained: Path, tmp_path: Path) -> None:
    folder = export_model(str(trained), str(tmp_path / "exported"))
    card = HubCard.load(folder / "README.md", ignore_metadata_errors=False)
    assert card.data.license == "unknown" and card.data.eval_results is None  # without metrics, no model-index
    assert (folder / "samples.png").is_file()
    (folder / "README.md").write_text("my own words")
    again = import_model(str(folder), str(tmp_path / "again"))
    assert (again / "README.md").read_text() == "my own words"
    with pytest.raises(UserError, match="Apache 2"):
        export_model(str(trained), str(tmp_path / "refused"), license_id="Apache 2")
    assert not (tmp_path / "refused").exists()


def edges(card: Card) -> Card:
    condition = ConditionCard(kind="edges", channels=1, dtype="uint8", downscale=1, mean=(0.0,), scale=(1.0,))
    return replace(card, condition=condition)


def own_network(card: Card) -> Card:
    config = card.denoiser.to_json() | {"network": "own_network.parts:Net", "network_options": {}}
    return replace(card, denoiser=DenoiserConfig.from_json(config))


def hostile(card: Card) -> Card:
    return replace(card, name="x\n---\n# <script>", class_names=("a | b", "`c`\n\n# d", "[e](javascript:f)"))


@pytest.mark.parametrize(
    ("change", "task", "wanted"),
    [
        (edges, "image-to-image", "patchloom sample . samples --seeds 0-63 --conditions FOLDER"),
        (own_network, "unconditional-image-generation", 'allow_backbones("own_network")'),
        (hostile, "unconditional-image-generation", r"a \| b, \`c\` \# d, \[e\](javascript:f)"),
    ],
)
def test_cards_of_other_models(trained: Path, tmp_path: Path, change: object, task: str, wanted: str) -> None:
    assert callable(change)
    card = change(read_card(trained / "model"))
    write_hub_card(tmp_path, FetchedModel(trained / "model", "run"), card, "mit", diffusers=False)
    found = HubCard.load(tmp_path / "README.md", ignore_metadata_errors=False)
    assert found.data.pipeline_tag == task and found.data.license == "mit"
    assert wanted in found.text and "<script>" not in found.text
    assert [line for line in found.text.splitlines() if line.startswith("# ")] == [found.text.strip().splitlines()[0]]
    compile(code_blocks(found), "README.md", "exec")
