"""Sampling one shard of seeds: what a worker does with it, the network beside the writing, and its note last."""

import json
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from patchloom.models.backbones import allow_backbones
from patchloom.models.checkpoints import load_whole_model
from patchloom.models.generate import generate_padded
from patchloom.pipelines.pages.pictures import png_pixels
from patchloom.pipelines.sample.folder import NOTES
from patchloom.pipelines.sample.formats import FORMATS, Picture, digest, read_contents
from patchloom.platform.compute.cluster import begin_work
from patchloom.platform.files.folder import Folder
from patchloom.platform.tracking.registry import fetch_model
from patchloom.platform.tracking.runs import tracking_uri

OUTPAINT = "outpaint.png"
REMOTE_WRITERS = 16  # a store answers slowly, and many at once


class ShardSampler:
    """Holds a model and samples shards of seeds into a folder, one image or one archive whole after the other."""

    def __init__(self, job: dict[str, Any]) -> None:
        begin_work()
        import torch

        torch.set_num_threads(1)  # as in `one_thread`, for as long as this process lives
        if tracking_uri() != job["tracking"]:  # another working directory
            os.environ["MLFLOW_TRACKING_URI"] = job["tracking"]
        allow_backbones(*job["backbones"])
        self.folder, self.options, self.sampling = Folder(job["folder"]), job["options"], job["sampling"]
        self.format, self.shard_size = FORMATS[self.options["format"]], self.options["shard_size"]
        self.count: Callable[[str, int], Any] | None = job["tally"].count.remote if "tally" in job else None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_whole_model(fetch_model(job["reference"]).folder, device)
        self.outpaint = None
        if self.options["outpaint"]:
            self.outpaint = torch.from_numpy(png_pixels(self.folder.read(OUTPAINT)).copy())
        local = 1 if device == "cpu" else max(1, (os.cpu_count() or 1) // 2)
        self.writers = ThreadPoolExecutor(REMOTE_WRITERS if self.folder.is_remote else local, "writer")

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """Sample shard `item["name"]`: the images of its seeds, then the note that says it is finished."""
        began = time.process_time()
        seeds, labels = [int(seed) for seed in item["seeds"]], [int(label) for label in item["labels"]]
        pictures = self._kept(json.loads(item["known"]))
        todo = [pair for pair in zip(seeds, labels, strict=True) if pair[0] not in pictures]
        batch, pending = self.options["batch"], deque[Future[Picture]]()
        for start in range(0, len(todo), batch):
            some, their = (list(column) for column in zip(*todo[start : start + batch], strict=True))
            images = generate_padded(self.model, some, their, batch, self.sampling, self.outpaint).cpu().numpy()
            pending.extend(map(lambda *one: self.writers.submit(self._keep, *one), some, their, images))
            while len(pending) > 4 * batch:  # a slow disk holds the network up, before memory runs out
                self._take(pending, pictures)
            if self.count is not None:
                self.count(item["name"], start + len(some))
        while pending:
            self._take(pending, pictures)
        self._finish(item["name"], [pictures[seed] for seed in sorted(pictures)])
        return {"name": item["name"], "images": len(todo), "cpu_seconds": time.process_time() - began}

    def _kept(self, known: list[dict[str, Any]]) -> dict[int, Picture]:
        """What an archive that is extended holds already."""
        found = read_contents(self.folder, known)
        return {
            entry["seed"]: Picture(entry["seed"], entry["label"], content)
            for entry, content in found
            if content is not None
        }

    def _keep(self, seed: int, label: int, image: np.ndarray) -> Picture:
        """An image as its format keeps it, written where it is a file of its own."""
        picture = Picture(seed, label, self.format.encode(image))
        if self.format.pack is None:  # not synced: the manifest's checksum finds what a power cut spoilt
            self.folder.write(self.format.file_of(seed, self.shard_size), picture.content, sync=False)
        return picture

    @staticmethod
    def _take(pending: "deque[Future[Picture]]", pictures: dict[int, Picture]) -> None:
        picture = pending.popleft().result()
        pictures[picture.seed] = picture

    def _finish(self, name: str, pictures: list[Picture]) -> None:
        """Write the archive, where it is one, then the note."""
        lines: list[dict[str, Any]] = [
            {
                "seed": picture.seed,
                "label": picture.label,
                "file": self.format.file_of(picture.seed, self.shard_size),
                "sha256": digest(picture.content),
            }
            for picture in pictures
        ]
        if self.format.pack is not None:
            self.folder.write(lines[0]["file"], self.format.pack(pictures))
        self.folder.write(f"{NOTES}/{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
