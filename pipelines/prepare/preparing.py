"""Prepare: images in, Arrow datasets of pixels or latents out.

The unit of work is a shard: a fixed range of the inputs of the source. Its bytes do not depend on its worker, so a
killed preparation keeps its finished shards and makes the others again.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from patchloom.errors import UserError
from patchloom.models.autoencoder import autoencoder_files
from patchloom.models.backbones import allowed_backbones
from patchloom.models.text_encoder import text_encoder_files
from patchloom.pipelines.prepare.images import Transform
from patchloom.pipelines.prepare.notes import ShardNotes, dataset_card, gather, note_name
from patchloom.pipelines.prepare.planning import (
    Preparation,
    check_transform,
    plan_dataset,
    plan_images,
    with_mirror_images,
)
from patchloom.pipelines.prepare.shard_maker import (
    PlannedShard,
    ShardMaker,
    ShardMakerArgument,
)
from patchloom.pipelines.prepare.texts import with_texts
from patchloom.platform.compute.jobs import (
    INPUTS_FOLDER,
    NOTES_FOLDER,
    PLAN_FILE,
    TEXT_ENCODER_FOLDER,
    Job,
    check_same,
    remove_work,
    run_job,
)
from patchloom.platform.compute.resources import DEFAULT_RESOURCES, Resources
from patchloom.platform.compute.shared_paths import UsedPaths
from patchloom.platform.dataset.prepared import CARD, NO_TEXT_FILE, Dataset, is_dataset, open_dataset
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.progress import say
from patchloom.platform.records.prepare import PLAN_ADDRESSES, PlanFile

HEAD_START_S = 10.0  # about as long as the start of Ray
LIST_BYTES = 4 << 20  # of inputs, after which a new file begins: few requests, and little to keep in memory


def prepare(
    source: str,
    dataset: str,
    *,
    resolution: int | None = None,
    crop: str = "center",
    resize: str = "lanczos",
    channels: int = 3,
    min_side: int = 0,
    labels: str | None = None,
    image_member: str | None = None,
    classes: str | None = None,
    split: str | None = None,
    autoencoder: str | None = None,
    precision: str = "fp32",
    mirror: bool = False,
    condition: str | None = None,
    text: str | None = None,
    text_encoder: str | None = None,
    short_side: int | None = None,
    stride: int | None = None,
    shard_rows: int | None = None,
    workers: int | None = None,
    resources: Resources = DEFAULT_RESOURCES,
) -> Dataset:
    """Prepare images as a dataset of pixels or latents, or encode a prepared dataset of pixels.

    A call after an interruption makes the shards that are missing. A call for a finished dataset does nothing.

    Args:
        source: a folder of images, .zip, .tar, WebDataset shards, .parquet, .arrow, .npz, a saved Hugging Face
            dataset, an LMDB, MNIST's idx files, CIFAR's archives, or a prepared dataset of pixels. It may be remote.
        dataset: the folder to write: a path, or s3://, gs://, ...
        resolution: side of the prepared images, in pixels. Not needed for crop="none".
        crop: "center", "dhariwal" (as ADM), "none", or "windows" of large photographs.
        resize: "lanczos", "box", "bicubic" or "bilinear", always antialiased.
        channels: 3, or 1 for grey.
        min_side: smaller images are skipped, in pixels.
        labels: a file of keys and labels: .csv, .tsv, .jsonl or .parquet, or EDM's dataset.json.
        image_member: WebDataset: which member of a key is the image, such as "input.png". Needed if a key has several.
        classes: which folder is the class of an image, instead of its label: "first", "last" (the one that contains
            it) or "none". Default: labels of the source; without any, the first folder that is not around everything,
            a split such as train, or numbered for storage such as 00000.
        split: which images to read, where the source has splits: "train", "test", "val" or "all". Default: "train" of
            CIFAR and of idx files, "all" of folders and archives.
        autoencoder: encode to latents with this autoencoder: models:/..., a folder or a hub id; "none" for pixels.
            Default: Stable Diffusion's for images of at least 256 pixels.
        precision: precision of the encoder, "fp32" or "bf16".
        mirror: also encode the mirror images, for latents.
        condition: an image that networks get next to the noisy one, stored with each image: "edges" (Canny's edges),
            "low-res:4" (the image at a fourth of its resolution, enlarged), or a source of images or .npy arrays
            (H, W, K) with the keys of the images, which are cropped and resized like them.
        text: the texts of the images, by their keys: captions (.csv, .tsv, .jsonl or .parquet) for `text_encoder`, or
            an .npz file with an embedding (tokens, width) of each text, and `no_text`, that of the empty text.
            ControlNets need them.
        text_encoder: encodes captions: a folder or hub id of a Stable Diffusion in the layout of diffusers, with
            `tokenizer/` and `text_encoder/`.
        short_side: windows: photographs are resized to this short side, in pixels. Default: 4 x resolution.
        stride: windows: pixels between windows. Default: resolution / 10.
        shard_rows: rows per shard. Default: at most 512, and at most 64 MiB of pixels; more if there would be more than
            256 shards, up to 128 MiB in a shard.
        workers: parallel processes. None: this process for 10 seconds, then all CPUs or GPUs. 0: this process.
        resources: the nodes that the workers may use. By default all.

    Returns:
        The finished dataset.

    Raises:
        UserError: the source contains no usable image, an option does not fit, or the folder contains something
            else.

    Example:
        dataset = patchloom.prepare("photos", "prepared", resolution=16)
        print(len(dataset), dataset.card["mean"])
    """
    if is_dataset(Folder.at(source)):
        _refuse_for_a_dataset(
            source, resolution=(resolution, None), crop=(crop, "center"), resize=(resize, "lanczos"),
            channels=(channels, 3), min_side=(min_side, 0), labels=(labels, None), image_member=(image_member, None),
            classes=(classes, None), split=(split, None), short_side=(short_side, None), stride=(stride, None),
        )  # fmt: skip
        preparation = plan_dataset(source, autoencoder, precision, condition)
    else:
        transform = check_transform(Transform(
            resolution or 0, crop, resize, channels=channels, min_side=min_side, short_side=short_side, stride=stride
        ))  # fmt: skip
        preparation = plan_images(
            source, labels, image_member, transform, autoencoder, precision, condition, classes, split
        )
    preparation = with_texts(preparation, text, text_encoder)
    if mirror:
        preparation = with_mirror_images(preparation)
    run_job(PrepareJob(Folder.at(dataset), preparation.with_shards(shard_rows)), workers, resources)
    return open_dataset(dataset)


def _refuse_for_a_dataset(source: str, **options: tuple[object, object]) -> None:
    """Raise UserError for an option of images, given with its default, that is not left at it."""
    for name, (value, default) in options.items():
        if value != default:
            raise UserError(
                f"--{name.replace('_', '-')} {value}: {source} is a prepared dataset, whose images are done: leave the "
                "option out, or prepare the images again"
            )


class PrepareJob(Job[PlannedShard, str]):
    """The job of `prepare`: its units are shards."""

    command = "prepare"
    worker: ClassVar[type[Any]] = ShardMaker
    folder: Folder

    def __init__(self, folder: Folder, preparation: Preparation) -> None:
        self.folder, self.preparation, self.plan = folder, preparation, preparation.plan
        self.total = len(preparation.inputs)
        self.on_gpus = preparation.encoder is not None or preparation.text_encoder is not None
        self.title = "encoding" if self.on_gpus else "preparing"
        self.head_start_s = 0.0 if self.on_gpus or os.environ.get("RAY_ADDRESS") else HEAD_START_S
        condition, text = self.plan.condition_source, self.plan.text_source
        sources = (self.plan.source, *(source for source in (condition, text) if source))
        self.paths = UsedPaths(read=sources, written=(folder.address,))
        self.argument = ShardMakerArgument(folder.address, allowed_backbones(), self.plan.source, condition, text)
        self.notes = ShardNotes(folder, -(-self.total // self.plan.shard_rows))

    def check_folder(self) -> None:
        """Raise UserError if the folder contains neither a preparation nor nothing."""
        if not self.folder.has(CARD):
            check_output_folder(self.folder, "preparation", PLAN_FILE)

    def start(self) -> bool:
        """Write the plan and the encoder; False if the dataset is complete."""
        if self.folder.has(CARD):
            card = self.folder.read_json(CARD)
            if not isinstance(card, dict) or card.get("preparation") != self.plan.identity():
                raise UserError(f"{self.folder} contains another dataset: choose an empty folder, or remove it")
            remove_work(self.folder)
            say(f"{self.folder} is complete: {len(open_dataset(self.folder.address)):,} rows", is_result=True)
            return False
        if self.folder.has(PLAN_FILE):
            found = PlanFile.parse(self.folder.read(PLAN_FILE), f"{self.folder}/{PLAN_FILE}")
            check_same(self.folder, "an unfinished preparation", found.plan, self.plan, ignored=PLAN_ADDRESSES)
        else:
            plan_file = PlanFile(identity=self.plan.identity(), plan=self.plan)
            self.folder.write_json(PLAN_FILE, plan_file.to_dict())
        self._write_encoders()
        return True

    def _write_encoders(self) -> None:
        encoder, text_encoder = self.preparation.encoder, self.preparation.text_encoder
        if encoder is not None:
            self._put_new(encoder, autoencoder_files(encoder), "autoencoder")
        if text_encoder is not None:
            self._put_new(text_encoder, text_encoder_files(text_encoder), TEXT_ENCODER_FOLDER)
        if self.preparation.no_text and not self.folder.has(NO_TEXT_FILE):  # that of an earlier call is kept
            self.folder.write(NO_TEXT_FILE, self.preparation.no_text)

    def _put_new(self, here: Path, names: list[str], there: str) -> None:
        """Copy the files of a folder that an earlier call did not copy."""
        written = self.folder.folder(there).files()
        for name in names:
            if written.get(name) != (here / name).stat().st_size:
                self.folder.put(here / name, f"{there}/{name}")

    def missing(self) -> list[PlannedShard]:
        """Shards without a note. Their inputs are written, those of many shards into one file."""
        noted = {f"{NOTES_FOLDER}/{name}" for name in self.folder.folder(NOTES_FOLDER).files()}
        missing = list[PlannedShard]()
        if len(noted) < self.notes.shards:
            for _ in self.folder.at_once(lambda one: self.folder.write(*one), self._lists(noted, missing)):
                pass
        return missing

    def _lists(self, noted: set[str], missing: list[PlannedShard]) -> Iterator[tuple[str, bytes]]:
        """The name and content of each list of inputs that has a missing shard; adds the missing shards to a list.

        The layout depends on the inputs only, so that a worker of an earlier call, which may still be alive, reads
        what it expects.
        """
        inputs, number = iter(self.preparation.inputs), 0
        for name in map("list-{:05d}.jsonl".format, itertools.count()):
            lines, known = bytearray(), len(missing)
            while len(lines) < LIST_BYTES and (batch := list(itertools.islice(inputs, self.plan.shard_rows))):
                first = len(lines)
                lines += b"".join(batch)
                shard = PlannedShard(number, len(batch), name, first, len(lines) - first)
                if note_name(number) not in noted:
                    missing.append(shard)
                number += 1
            if not lines:
                return
            if len(missing) > known:
                yield f"{INPUTS_FOLDER}/{name}", bytes(lines)

    def keep(self, unit: PlannedShard, result: str) -> None:
        """Keep the note of a shard."""
        self.notes.keep(unit.number, result)

    def finish(self) -> None:
        """Combine the notes into `skipped.jsonl` and `dataset.json`, which completes the dataset."""
        found = gather(self.notes)
        if not found.rows:
            self._refuse(found.reasons)
        no_text = self.folder.read(NO_TEXT_FILE) if self.plan.text else b""
        self.folder.write_json(CARD, dataset_card(self.plan, found, no_text).to_dict())
        remove_work(self.folder)
        others = self.preparation.other_files
        not_read = f" (other files, not read: {others})" if others else ""
        skipped = found.reasons.total()
        for line in found.first_skipped:
            say(f"  skipped {line}")
        if more := skipped - len(found.first_skipped):
            say(f"  skipped {more:,} more, which {self.folder}/skipped.jsonl lists")
        say(
            f"{found.rows:,} rows + {skipped:,} skipped = {self.total:,} inputs in {self.folder}{not_read}",
            is_result=True,
        )

    def _refuse(self, reasons: Counter[str]) -> None:
        """Remove what was written; raises UserError with the most common reasons."""
        remove_work(self.folder)  # there is no shard
        if self.preparation.encoder is not None:
            for name in autoencoder_files(self.preparation.encoder):
                self.folder.remove(f"autoencoder/{name}")
        self.folder.remove(NO_TEXT_FILE)
        found = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(2))
        raise UserError(
            f"none of the {self.total} inputs in {self.preparation.source_name} can be used ({found}): "
            "give readable images"
        )
