"""Features that are not finite: the image is named, on every path, and no result is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patchloom.errors import UserError
from patchloom.pipelines.evaluate.evaluation import evaluate


class MeanOverMaximum(torch.nn.Module):
    """Features that are NaN for a black image: its maximum is 0."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = images.double().flatten(1)
        return torch.stack([values.mean(1) / values.amax(1), values.std(1)], 1)


@pytest.mark.parametrize("side", ["samples", "reference"])
@pytest.mark.parametrize("metrics", [None, ("fd",), ("kid",), ("precision",)])
def test_image_with_nan_features_is_named(tmp_path: Path, side: str, metrics: tuple[str, ...] | None) -> None:
    torch.jit.script(MeanOverMaximum()).save(str(tmp_path / "features.pt"))
    generator = np.random.default_rng(0)
    for folder in ("samples", "reference"):
        (tmp_path / folder).mkdir()
        for number in range(8):
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{number}.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / side / "night.png")
    arguments = str(tmp_path / "samples"), str(tmp_path / "reference")
    options = {"metrics": metrics, "features": str(tmp_path / "features.pt"), "out": str(tmp_path / "metrics.json")}
    with pytest.raises(UserError) as refused:
        evaluate(*arguments, **options, workers=0)  # type: ignore[arg-type]
    assert "night.png" in str(refused.value) and not (tmp_path / "metrics.json").exists()
    (tmp_path / side / "night.png").unlink()
    evaluate(*arguments, **options, workers=0)  # type: ignore[arg-type]
