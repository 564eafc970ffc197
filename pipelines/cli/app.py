"""The command line: parse, call one pipeline function, print; what a user got wrong is one line and exit code 2."""

import contextlib
import json
import os
import signal
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

from patchloom import __version__
from patchloom.errors import Stopped, UserError
from patchloom.models.backbones import allow_backbones
from patchloom.pipelines.cli.machine import benchmark, doctor
from patchloom.pipelines.cli.models import Backbones, Json, aside, models_app
from patchloom.pipelines.cli.sample import sample

app = typer.Typer(
    help="Patchloom trains image diffusion models on patches, on Ray, and keeps every run and model in MLflow.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
autoencoder_app = typer.Typer(help="Train an autoencoder of one's own.", rich_markup_mode=None)
app.add_typer(autoencoder_app, name="autoencoder")
app.add_typer(models_app, name="models")

CTRL_C = 128 + signal.SIGINT
Workers = Annotated[int | None, typer.Option(min=1, help="Processes at once; all CPUs or GPUs by default")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key")]


@app.command(epilog="Example: patchloom demo --out demo")
def demo(
    out: Annotated[str, typer.Option(help="Folder for everything that the demo makes")] = "demo",
    pixels: Annotated[bool, typer.Option("--pixels", help="Diffuse pixels, without an autoencoder")] = False,
) -> None:
    """Run the whole chain on photographs that ship with scikit-image."""
    from patchloom.pipelines.demo import demo as run

    run(out, pixels=pixels)


@app.command(epilog="Example: patchloom prepare photos.zip dataset --resolution 64 --crop center")
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images (class = first sub-folder), .zip, .tar, .parquet, .arrow, .npz, WebDataset "
            "shards, a saved Hugging Face dataset, or a pixel dataset to encode"
        ),
    ],
    dataset: Annotated[str, typer.Argument(help="The folder to write, here or at s3://, gs://, ...")],
    resolution: Annotated[int | None, typer.Option(min=1, help="Side of the prepared images, in pixels")] = None,
    crop: Annotated[
        str, typer.Option(help="center, dhariwal (as ADM), none, or windows of large photographs")
    ] = "center",
    resize: Annotated[str, typer.Option(help="lanczos, box, bicubic or bilinear, always antialiased")] = "lanczos",
    channels: Annotated[int, typer.Option(help="3, or 1 for grey")] = 3,
    min_side: Annotated[int, typer.Option(min=0, help="Leave out images that are smaller, in pixels")] = 0,
    labels: Annotated[
        str | None, typer.Option(help="A .csv, .jsonl or .parquet of key and label, or EDM's dataset.json")
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="Encode to latents: models:/NAME/VERSION, a folder, or a hub id; by default Stable Diffusion's at "
            "256 pixels and more; none for pixels"
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="What the encoder computes in: fp32 or bf16")] = "fp32",
    mirror: Annotated[bool, typer.Option("--mirror", help="Latents: encode mirror images too")] = False,
    short_side: Annotated[int | None, typer.Option(min=1, help="windows: photographs are resized to it")] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="windows: pixels between them")] = None,
    allow_backbone: Backbones = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Processes at once; 0 is this one; by default this one for 10 s, then all CPUs or GPUs"
        ),
    ] = None,
) -> None:
    """Turn images into an Arrow dataset of pixels or latents."""
    allow_backbones(*allow_backbone or [])
    from patchloom.pipelines.prepare.preparing import prepare as run

    run(
        source, dataset, resolution=resolution, crop=crop, resize=resize, channels=channels, min_side=min_side,
        labels=labels, autoencoder=autoencoder, precision=precision, mirror=mirror, short_side=short_side,
        stride=stride, workers=workers,
    )  # fmt: skip


@app.command(epilog="Example: patchloom inspect dataset")
def inspect(
    what: Annotated[str, typer.Argument(help="A dataset folder, a model folder or models:/NAME@ALIAS")],
    allow_backbone: Backbones = None,
) -> None:
    """Verify a dataset or model and print its card; a dataset's contact sheet is written beside it."""
    allow_backbones(*allow_backbone or [])
    from patchloom.pipelines.inspect import inspect as run
    from patchloom.pipelines.inspect import statistics_table

    with contextlib.redirect_stdout(sys.stderr):  # what comes out is the card alone
        card = run(what)
    print(json.dumps(card, indent=2, ensure_ascii=False))
    if "contact_sheet" in card:  # beside the JSON, for who looks
        print(statistics_table(card), file=sys.stderr)
        if card["contact_sheet"]:
            print(f"  look at it: {card['contact_sheet']}", file=sys.stderr)


@autoencoder_app.command("train", epilog="Example: patchloom autoencoder train dataset --out ae --register my-vae")
def autoencoder_train(
    dataset: Annotated[str, typer.Argument(help="A prepared dataset of pixels")],
    out: Annotated[str, typer.Option(help="The run folder")],
    widths: Annotated[str, typer.Option(help="Channels a level; each further one halves the image")] = "16,32,32",
    latent_channels: Annotated[int, typer.Option(min=1)] = 4,
    images: Annotated[int, typer.Option(min=1, help="Patches to train on")] = 7_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    patch: Annotated[int, typer.Option(min=1, help="Side of the patches, in pixels")] = 32,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Adam's learning rate at its peak; 2e-3, or 1e-4 with --init-from")
    ] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Fine-tune this AutoencoderKL: models:/..., a folder, or a hub id")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 is this process")] = 1,
    register: Annotated[str | None, typer.Option(help="Name in the MLflow registry")] = None,
) -> None:
    """Train a variational autoencoder (diffusers' AutoencoderKL), or fine-tune one, and measure it."""
    from patchloom.pipelines.train.autoencoder import AutoencoderSettings, train_autoencoder

    if not all(part.strip().isdigit() for part in widths.split(",")):
        raise UserError(f"--widths {widths} is not a list of whole numbers: write 16,32,32")
    settings = AutoencoderSettings(
        tuple(int(part) for part in widths.split(",")), latent_channels, images, batch_size, patch,
        lr=lr or (1e-4 if init_from else 2e-3), init_from=init_from,
    )  # fmt: skip
    train_autoencoder(dataset, out, settings, workers=workers, register=register)


@app.command(epilog="Example: patchloom train demo_latents --data latents --out run --set patches.p=0.25 --workers 2")
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe: a YAML file, or the name of a shipped one")],
    data: Annotated[str, typer.Option(help="A prepared dataset")],
    out: Annotated[str | None, typer.Option(help="The run folder")] = None,
    set_: Settings = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 is this process")] = 1,
    min_workers: Annotated[
        int | None, typer.Option(min=1, help="Go on with as few where nodes were lost, until they come back")
    ] = None,
    microbatch: Annotated[
        int | None, typer.Option(min=1, help="Crops at once in a worker, where memory is short; the batch stays")
    ] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the network, once a patch size: minutes first, faster then")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Name the first costs of a step, and keep a trace")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what the run would be, and stop")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="--dry-run: time a few steps of each patch size")] = False,
    allow_backbone: Backbones = None,
) -> None:
    """Train a recipe on a prepared dataset."""
    from patchloom.platform.recipe.run_recipe import load_recipe

    allow_backbones(*allow_backbone or [])
    loaded = load_recipe(recipe, set_ or [])
    if dry_run:
        from patchloom.pipelines.train.dry_run import run_plan

        print(run_plan(loaded, data, max(1, workers), measure))
        return
    if not out:
        raise UserError("--out is missing: give the folder of the run")
    from patchloom.pipelines.train.training import train as run

    result = run(
        loaded, data, out, workers=workers, min_workers=min_workers, microbatch=microbatch, compile=compile_,
        profile=profile, resume=resume,
    )  # fmt: skip
    print(f"the model is {result.model}; register it: patchloom models register {result.folder} NAME --alias champion")


@app.command(epilog="Example: patchloom tune demo_search --data latents --out search")
def tune(
    search: Annotated[str, typer.Argument(help="A search: a YAML file, or the name of a shipped one")],
    data: Annotated[str, typer.Option(help="A prepared dataset")],
    out: Annotated[str | None, typer.Option(help="The folder of the search")] = None,
    restore: Annotated[bool, typer.Option("--restore", help="Go on with an interrupted search")] = False,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Trials at once; as many as fit by default")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray Train workers a trial; 0 is the trial's own process")] = 0,
    gpus: Annotated[
        float | None, typer.Option(min=0, help="A trial's part of a GPU, such as 0.25 for four on one; 1 by default")
    ] = None,
    register_best: Annotated[
        str | None, typer.Option(metavar="NAME", help="Register the best trial's model under this name")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the trials, their cost and time, and stop")] = False,
    allow_backbone: Backbones = None,
) -> None:
    """Search recipe keys (p, the schedule, ...) at an equal budget, and answer with a page."""
    from patchloom.platform.compute.tuner import Resources

    allow_backbones(*allow_backbone or [])
    if dry_run:
        from patchloom.pipelines.tune.dry_run import search_plan

        at_once = Resources(concurrent, workers, gpus).at_once(os.cpu_count() or 1, 0)
        print(search_plan(search, data, at_once))
        return
    if not out:
        raise UserError("--out is missing: give the folder of the search")
    from patchloom.pipelines.tune.tuning import tune as run

    result = run(
        search, data, out, restore=restore, concurrent=concurrent, workers=workers, gpus=gpus,
        register_best=register_best,
    )  # fmt: skip
    print(f"train the best at full length: patchloom train {result.folder / 'best.yaml'} --data {data} --out RUN")


@app.command(epilog="Example: patchloom evaluate samples --reference dataset")
def evaluate(
    samples: Annotated[str, typer.Argument(help="A folder of `patchloom sample` or of PNG files, .npz, or a dataset")],
    reference: Annotated[str, typer.Option(help="Any of these, or an .npz of statistics (EDM's or ADM's)")],
    metrics: Annotated[
        str | None, typer.Option(help="fid,sfid,kid,is,precision,recall; fd,psnr,ssim; all that is possible by default")
    ] = None,
    features: Annotated[
        str, typer.Option(help="inception, colours (no network), dinov2, or a file of weights or TorchScript")
    ] = "inception",
    out: Annotated[str | None, typer.Option(help="JSON file; SAMPLES/metrics.json by default")] = None,
    save_reference: Annotated[
        str | None, typer.Option(metavar="NPZ", help="Keep the reference's statistics (mu, sigma, mu_s, sigma_s)")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that go through the network at once")] = 32,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Measure images against a reference: FID, KID, precision and recall, ..."""
    from patchloom.pipelines.evaluate.evaluation import evaluate as run

    with aside(as_json):
        result = run(
            samples, reference, metrics=tuple(metrics.split(",")) if metrics else None, features=features, out=out,
            save_reference=save_reference, workers=workers, batch=batch,
        )  # fmt: skip
    if as_json:
        print(json.dumps(result))


@app.command(epilog="Example: patchloom report demo report.html")
def report(
    folder: Annotated[str, typer.Argument(help="A run, a search, or the folder of a demo")],
    out: Annotated[str, typer.Argument(help="The HTML file to write")],
) -> None:
    """One page: data, curves, trials, samples, numbers and what to do next."""
    from patchloom.pipelines.report import report as run

    print(f"open {run(folder, out)}")


app.command(epilog="Example: patchloom sample models:/patchloom-demo@champion samples --seeds 0-63")(sample)
app.command(epilog="Example: patchloom benchmark train.sizes sample --json")(benchmark)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop")] = False,
) -> None:
    if version:
        print(f"patchloom {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line: exit code 0 done, 2 the user's mistake in one line, 1 a failure of ours."""
    try:
        code: Any = typer.main.get_command(app)(standalone_mode=False)
    except KeyboardInterrupt:
        _stopped()
    except Exception as error:
        if type(error).__name__ == "Abort":  # what typer makes of Ctrl-C
            _stopped()
        if isinstance(error, Stopped):
            print(f"patchloom: stopped; {error}", file=sys.stderr)
            sys.exit(128 + signal.SIGTERM)
        mistake = _usage_words(error) or _users_mistake(error)
        if mistake is not None:
            print(f"patchloom: {' '.join(mistake.split())}", file=sys.stderr)
            sys.exit(2)
        traceback.print_exc()
        sys.exit(1)
    if code == CTRL_C:  # what newer versions of typer make of it
        _stopped()
    sys.exit(code if isinstance(code, int) else 0)


def _stopped() -> NoReturn:
    print("patchloom: stopped; the same command goes on (train with --resume, tune with --restore)", file=sys.stderr)
    sys.exit(CTRL_C)


def _usage_words(error: Exception) -> str | None:
    """What typer says of a wrong command line, in one line; its exceptions live in click or in typer itself."""
    if not hasattr(error, "format_message"):
        return None
    words = str(error.format_message()).replace("\n", " ").rstrip(".")
    context = getattr(error, "ctx", None)
    path = context.command_path.split()[1:] if context else []
    return f"{words}; see `{' '.join(['patchloom', *path])} --help`"


def _users_mistake(error: BaseException | None) -> str | None:
    """The message of a user's mistake, also where a worker of Ray wrapped it."""
    from patchloom.models.checkpoints import CheckpointError

    while error is not None:
        if isinstance(error, (UserError, CheckpointError)):
            return str(error)
        error = getattr(error, "cause", None) or error.__cause__
    return None
