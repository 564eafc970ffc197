"""Folders of searches with known numbers, written without training."""

from pathlib import Path

from patchloom.platform.files.folder import Folder
from patchloom.platform.files.storage import make_folder, write_json
from patchloom.platform.records.run import ProgressLine, write_progress
from patchloom.platform.records.search import TrialRow, write_trials

SPACE = {"patches.p": {"grid": [0.25, 0.5, 1.0]}, "optimizer.lr": {"grid": [1e-3, 2e-3]}}
TFLOP_PER_IMAGE = {0.25: 0.002, 0.5: 0.003, 1.0: 0.005}


def write_search_folder(folder: Path) -> Path:
    """A search of p and the learning rate with two repeats, all finished but one that failed."""
    make_folder(folder)
    search = {"space": SPACE, "budget": {"images": 1000}, "name": "p-and-lr", "recipe": "base.yaml", "repeats": 2}
    write_json(folder / "search.json", {"format_version": 2, "kind": "search", "run_id": "0", "images": [],
                                        "search": search, "dataset_fingerprint": "a"})  # fmt: skip
    settings = [{"patches.p": p, "optimizer.lr": lr} for p in (0.25, 0.5, 1.0) for lr in (1e-3, 2e-3)]
    rows = []
    for number, setting in enumerate(settings):
        for repeat in range(2):
            loss = 0.2 + 0.05 * setting["patches.p"] + 10 * setting["optimizer.lr"] + 0.003 * repeat
            flops = 1e12 * TFLOP_PER_IMAGE[setting["patches.p"]] * 1000
            rows.append(TrialRow.model_validate({
                "name": f"{number:03d}-{repeat}", "settings": setting, "repeat": repeat, "status": "finished",
                "updates": 100, "images_seen": 1000, "flops": flops, "seconds": flops / 1e11, "held_out_loss": loss,
                "held_out_loss_by_sigma": {"0.1": loss / 2, "1": loss * 2}, "final_distance": 2 * loss,
            }))  # fmt: skip
    lost = {"patches.p": 1.0, "optimizer.lr": 5e-3}
    rows.append(TrialRow(name="099-0", settings=lost, status="failed", error="the node was lost: " + "x" * 90))
    write_trials(Folder.at(folder), rows)
    for row in rows[:-1]:
        loss, flops = row.held_out_loss or 0.0, row.flops or 0.0
        points = [
            ProgressLine(step=images // 10, updates=images // 10, images_seen=images, flops=flops * images / 1000,
                         held_out_loss=loss + 10 / images)
            for images in (250, 500, 1000)
        ]  # fmt: skip
        write_progress(make_folder(folder / "trials" / row.name), points)
    return folder
