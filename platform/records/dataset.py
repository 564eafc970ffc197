"""The record of a prepared dataset: `dataset.json`."""

from typing import ClassVar, Literal

from pydantic import Field

from patchloom.platform.records.record import Record, VersionedRecord

SplitBy = Literal["key", "region"]


def _is_none(value: object) -> bool:
    return value is None


class SkippedInputs(Record):
    """How many inputs were skipped, and how many for each reason."""

    count: int
    reasons: dict[str, int]


class ClassRows(Record):
    """The name of a class and its number of rows."""

    name: str
    rows: int


class ImageTransform(Record):
    """How each image was cropped and resized; see `patchloom prepare --help` for the options."""

    resolution: int
    crop: str
    resize: str
    antialias: bool
    channels: int
    min_side: int
    short_side: int | None
    stride: int | None


class DatasetAutoencoder(Record):
    """The autoencoder that encoded a dataset of latents.

    A latent enters a network as `(latent - shift) * scale`, unless it is whitened. Where the autoencoder has
    statistics of its latents, that is `(latent - latents_mean) * scale / latents_std`. `downscale` is the number of
    image pixels per latent pixel along one side.
    """

    class_name: str = Field(alias="class")
    weights_sha256: str
    downscale: int
    latent_channels: int
    scale: int | float
    shift: int | float = 0.0
    latents_mean: list[float] | None = Field(default=None, exclude_if=_is_none)
    latents_std: list[float] | None = Field(default=None, exclude_if=_is_none)
    reference: str
    precision: Literal["fp32", "bf16"] = "fp32"


class DatasetCondition(Record):
    """The condition images of a dataset, in the column `condition`.

    `kind` is "edges" or "low-res" with its `factor`, which are computed from the images, or "images" from a source of
    their own. `channels` are those of a condition image K, which has the size of the image in pixels. The column has
    K * downscale^2 channels at the resolution of the dataset: for latents, each block of pixels is one pixel. `mean`
    and `std` are population figures per channel K, in stored units.
    """

    kind: Literal["edges", "low-res", "images"]
    factor: int | None = Field(default=None, exclude_if=_is_none)
    channels: int
    dtype: Literal["uint8", "float16", "float32"]
    downscale: int
    mean: list[float]
    std: list[float]


class DatasetText(Record):
    """The text embeddings of a dataset, in the column `text`: (tokens, width) float16 for each row.

    `no_text.npy` next to the card has the embedding of the empty text; `no_text_sha256` is of that file. `encoder` and
    `encoder_sha256` are the name and the files of the encoder, if the dataset was prepared from captions.
    """

    tokens: int
    width: int
    no_text_sha256: str
    encoder: str | None = Field(default=None, exclude_if=_is_none)
    encoder_sha256: str | None = Field(default=None, exclude_if=_is_none)


class ShardFile(Record):
    """One Arrow file of the dataset. `file` is its path relative to the dataset."""

    file: str
    rows: int
    bytes: int
    sha256: str


class IndexFile(Record):
    """The file with a hash of each row's key. `file` is its path relative to the dataset."""

    file: str
    rows: int
    bytes: int
    sha256: str


class ShardListFile(Record):
    """The file that lists the shards of a dataset of many. `file` is its path relative to the dataset."""

    file: str
    shards: int
    bytes: int
    sha256: str


class DatasetCard(VersionedRecord):
    """The description of a prepared dataset.

    `mean` and `std` are population figures per channel, in stored units (0 to 255 for pixels). `split_by` says what
    is held out together: single keys, or regions of a photograph whose crops overlap. `source_sha256` covers the
    inputs, and `preparation` everything that the bytes of the shards depend on. A dataset of many shards has them in
    a list next to the card; then its format is 2, otherwise 1. One of many rows has an index.
    """

    FORMAT: ClassVar[int] = 2

    kind: Literal["pixels", "latents"]
    resolution: int
    channels: int
    dtype: Literal["uint8", "float16"]
    rows: int
    inputs: int
    skipped: SkippedInputs
    classes: list[ClassRows]
    mean: list[float]
    std: list[float]
    transform: ImageTransform | None
    mirror: bool = False
    split_by: SplitBy = "key"
    autoencoder: DatasetAutoencoder | None
    condition: DatasetCondition | None = Field(default=None, exclude_if=_is_none)
    text: DatasetText | None = Field(default=None, exclude_if=_is_none)
    source_sha256: str
    preparation: str
    shards: list[ShardFile]
    shard_list: ShardListFile | None = Field(default=None, exclude_if=_is_none)
    index: IndexFile | None = Field(default=None, exclude_if=_is_none)
