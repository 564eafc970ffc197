"""A folder evaluated against itself prepared has distance 0, whatever the format of its images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchloom.errors import UserError
from patchloom.pipelines.evaluate import evaluate
from patchloom.pipelines.prepare import prepare

SIDE, COUNT = 16, 6


def values(number: int, channels: int = 1, most: int = 255, kind: type = np.uint8) -> np.ndarray:
    shape = (SIDE, SIDE, channels) if channels > 1 else (SIDE, SIDE)
    return np.random.default_rng(number).integers(0, most + 1, shape).astype(kind)


def sixteen_bit(number: int) -> Image.Image:
    return Image.fromarray(values(number, most=65535, kind=np.uint16))


def transparent(number: int) -> Image.Image:
    return Image.fromarray(values(number, 4), "RGBA")


def grey_with_alpha(number: int) -> Image.Image:
    return Image.merge("LA", [Image.fromarray(values(number)), Image.fromarray(values(number + 100))])


def palette(number: int) -> Image.Image:
    return Image.fromarray(values(number, 3)).quantize(16)


def rotated(number: int) -> Image.Image:
    return Image.fromarray(values(number, 3))


def write(folder: Path, make: object) -> Path:
    folder.mkdir()
    for number in range(COUNT):
        options = {}
        if make is rotated:
            exif = Image.Exif()
            exif[0x0112] = 6  # a quarter turn
            options = {"exif": exif}
        make(number).save(folder / f"{number}.png", **options)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("make", [sixteen_bit, transparent, grey_with_alpha, palette, rotated])
@pytest.mark.parametrize("channels", [1, 3])
def test_distance_to_itself_prepared_is_zero(make: object, channels: int, tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", make)
    is_colour = make not in (sixteen_bit, grey_with_alpha)
    prepare(str(photos), str(tmp_path / "pixels"), resolution=SIDE, channels=channels, workers=0)
    if is_colour and channels == 1:
        with pytest.raises(UserError, match=r"3 and .* 1 channels"):
            evaluate(str(photos), str(tmp_path / "pixels"), features="colours", workers=0)
        return
    result = evaluate(
        str(photos), str(tmp_path / "pixels"), features="colours", workers=0, out=str(tmp_path / "m.json")
    )
    assert result.metrics["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert result.pictures


def test_grey_and_colour_datasets_are_refused_before_any_work(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", rotated)
    for channels in (1, 3):
        prepare(str(photos), str(tmp_path / str(channels)), resolution=SIDE, channels=channels, workers=0)
    with pytest.raises(UserError, match=r"3 and .* 1 channels"):
        evaluate(str(tmp_path / "3"), str(tmp_path / "1"), features="colours", workers=0)


def test_a_folder_of_grey_and_colour_is_refused_by_its_channels(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", sixteen_bit)
    rotated(9).save(photos / "9.png")
    with pytest.raises(UserError, match=r"9\.png has 16x16 pixels in 3 channels.*1 channel"):
        evaluate(str(photos), str(photos), features="colours", workers=0)


def test_a_damaged_file_of_the_reference_is_skipped_and_one_of_the_samples_is_not(tmp_path: Path) -> None:
    photos, samples = write(tmp_path / "photos", rotated), write(tmp_path / "samples", rotated)
    (photos / "3.png").write_bytes((photos / "3.png").read_bytes()[:90])
    (photos / ".hidden.png").write_bytes(b"")
    result = evaluate(str(samples), str(photos), features="colours", workers=0)
    assert (result.identity.n_samples, result.identity.n_reference) == (COUNT, COUNT - 1)
    with pytest.raises(UserError, match=r"3\.png"):
        evaluate(str(photos), str(samples), features="colours", workers=0)


def test_pictures_that_cannot_be_drawn_do_not_cost_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr("patchloom.pipelines.evaluate.results.save_png", fail)
    photos = write(tmp_path / "photos", rotated)
    place = tmp_path / "metrics.json"
    result = evaluate(str(photos), str(photos), features="colours", workers=0, out=str(place))
    assert result.pictures == [] and place.is_file()


def test_a_run_is_not_evaluated_by_its_previews(tmp_path: Path) -> None:
    photos = write(tmp_path / "photos", rotated)
    run = tmp_path / "run"
    (run / "previews").mkdir(parents=True)
    rotated(1).save(run / "previews" / "step-1.png")
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match="is a run"):
        evaluate(str(run), str(photos), features="colours", workers=0)
    with pytest.raises(UserError, match="is a run"):
        evaluate(str(photos), str(run), features="colours", workers=0)
