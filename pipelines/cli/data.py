"""The commands about data: prepare a dataset, inspect a dataset or model."""

from typing import Annotated

import typer

from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.cli.options import (
    Backbones,
    FolderToWrite,
    Gpus,
    ResourceSettings,
    Wait,
    check_order,
    chosen_resources,
    exists_here,
)
from patchloom.pipelines.cli.output import Printed

ImageSource = Annotated[
    str,
    typer.Argument(
        help="Images: a folder (classes are its first-level sub-folders), .zip, .tar (also of tars, as ImageNet's), "
        "WebDataset shards, .parquet, .arrow, .npz, a saved Hugging Face dataset, LMDB (LSUN), idx files (MNIST) or "
        "CIFAR's archives. Or a prepared dataset of pixels, to encode as latents"
    ),
]
Resolution = Annotated[
    int | None,
    typer.Option(min=1, help="Width and height of the prepared images, in pixels; optional for --crop none"),
]
Crop = Annotated[
    str,
    typer.Option(
        help="center, dhariwal (ADM's centre crop), none (all images must be square), or windows (many crops per image)"
    ),
]
LabelsFile = Annotated[
    str | None,
    typer.Option(
        help="Labels file: .csv, .jsonl or .parquet with key and label, or EDM's dataset.json  "
        "[default: labels in SOURCE]"
    ),
]
ClassFolder = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Which folder of an image is its class, instead of its label: first, last or none  [default: labels in "
        "SOURCE, else the first folder that is not around everything, a split (train, test) or storage (00000)]",
    ),
]
SourceSplit = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which images of CIFAR, idx files, or folders named train, test or val: train, test, val or all  "
        "[default: train of CIFAR and idx files, else all]",
    ),
]
EncodeWith = Annotated[
    str | None,
    typer.Option(
        help="Encode images as latents: models:/NAME/VERSION, a folder, a Hugging Face name, or none for pixels  "
        "[default: Stable Diffusion's at 256 pixels and above, else none]"
    ),
]
Condition = Annotated[
    str | None,
    typer.Option(
        metavar="edges|low-res:F|SOURCE",
        help="Store an image for the network to follow with each image: Canny edges, the image at 1/F of its "
        "resolution, or images or .npy arrays of the same names from another source",
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Store a text embedding with each image, which ControlNets need: captions (.csv, .jsonl or .parquet with "
        "key and text) for --text-encoder, or an .npz file with arrays of shape tokens x width, by the names of the "
        "images, and no_text, the embedding of the empty text",
    ),
]
TextEncoderReference = Annotated[
    str | None,
    typer.Option(
        metavar="REF",
        help="Encode the captions of --text with the text encoder of this Stable Diffusion: a folder with tokenizer/ "
        "and text_encoder/, or a Hugging Face name (needs patchloom[text])",
    ),
]
ShortSide = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="With --crop windows: resize photographs to this shorter side, in pixels  [default: 4 x --resolution]",
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(min=1, help="With --crop windows: distance between windows, in pixels  [default: --resolution / 10]"),
]
PrepareWorkers = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Parallel worker processes; 0 runs in this process, without Ray  "
        "[default: this process for 10 seconds, then all GPUs or CPUs]",
    ),
]


def prepare(
    source: ImageSource,
    dataset: FolderToWrite,
    resolution: Resolution = None,
    crop: Crop = "center",
    resize: Annotated[str, typer.Option(help="Antialiased filter: lanczos, box, bicubic or bilinear")] = "lanczos",
    channels: Annotated[int, typer.Option(help="Colour channels: 3 for RGB, 1 for grey")] = 3,
    min_side: Annotated[int, typer.Option(min=0, help="Skip images whose shorter side has fewer pixels than this")] = 0,
    labels: LabelsFile = None,
    image_member: Annotated[
        str | None,
        typer.Option(
            metavar="ENDING", help="WebDataset: which member is the image, such as input.png  [default: the only image]"
        ),
    ] = None,
    classes: ClassFolder = None,
    split: SourceSplit = None,
    autoencoder: EncodeWith = None,
    precision: Annotated[str, typer.Option(help="Arithmetic of the encoder: fp32 or bf16")] = "fp32",
    mirror: Annotated[bool, typer.Option("--mirror", help="With latents: encode mirror images too")] = False,
    condition: Condition = None,
    text: Text = None,
    text_encoder: TextEncoderReference = None,
    short_side: ShortSide = None,
    stride: Stride = None,
    allow_backbone: Backbones = None,
    workers: PrepareWorkers = None,
    gpus: Gpus = None,
    resources: ResourceSettings = None,
    wait: Wait = None,
) -> Printed:
    """Turn images into an Arrow dataset of pixels or latents."""
    check_order("SOURCE DATASET", source, dataset, exists_here)
    allow_backbones(*allow_backbone or [])
    nodes = chosen_resources(resources, wait, workers, gpus)
    from patchloom.pipelines.prepare.preparing import prepare

    made = prepare(
        source, dataset, resolution=resolution, crop=crop, resize=resize, channels=channels, min_side=min_side,
        labels=labels, image_member=image_member, classes=classes, split=split, autoencoder=autoencoder,
        precision=precision, mirror=mirror, condition=condition, text=text, text_encoder=text_encoder,
        short_side=short_side, stride=stride,
        workers=nodes.workers, resources=nodes,
    )  # fmt: skip
    skipped = {"count": made.card.skipped.count, "reasons": made.card.skipped.reasons}
    counts = {"kind": made.card.kind, "rows": made.card.rows, "inputs": made.card.inputs, "skipped": skipped}
    return Printed({"dataset": made.address, "fingerprint": made.fingerprint, **counts})


def inspect(
    what: Annotated[str, typer.Argument(help="Dataset folder, model folder or models:/NAME@ALIAS")],
    allow_backbone: Backbones = None,
) -> Printed:
    """Verify a dataset or a model, and show what is in it.

    A dataset also gets a contact sheet, contact_sheet.png in its folder. With --json, the whole card is printed.
    """
    allow_backbones(*allow_backbone or [])
    from patchloom.pipelines.inspect import inspect

    found = inspect(what)
    return Printed(found.to_json(), found.summary())
