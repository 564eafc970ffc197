"""The command line: the list of commands, and how errors become one line and an exit code."""

import errno
import os
import signal
import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

from patchloom import __version__
from patchloom.errors import Stopped, Terminated, UserError, WorkersFailed
from patchloom.pipelines.cli.cache import cache_app
from patchloom.pipelines.cli.completion import completion, prepare_completion
from patchloom.pipelines.cli.data import inspect, prepare
from patchloom.pipelines.cli.help import CommandApp
from patchloom.pipelines.cli.launch import launch_app
from patchloom.pipelines.cli.machine import benchmark, demo, doctor, reproduce
from patchloom.pipelines.cli.models import models_app
from patchloom.pipelines.cli.results import evaluate, report
from patchloom.pipelines.cli.sample import sample
from patchloom.pipelines.cli.training import autoencoder_train, recipes, train, tune
from patchloom.platform.compute.stopping import exit_on_sigterm
from patchloom.platform.progress import is_verbose
from patchloom.redaction import RedactedStream, printable

INTERRUPTED = 128 + signal.SIGINT  # exit codes of a shell for Ctrl-C and for SIGTERM
TERMINATED = 128 + signal.SIGTERM
DISK_PROBLEMS = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space, or ask for a larger quota",
    errno.EFBIG: "raise the largest size of a file (ulimit -f), or use another file system",
    errno.EROFS: "choose a folder on another file system",
}
CONTINUE = "run the same command again to continue (train with --resume, tune with --restore)"

# the sections of the help
FIRST_STEPS, ON_DATA, ON_TRAINING = "Begin here", "Data", "Train and search"
ON_MODELS, ON_MACHINES = "Use and measure models", "Machines and the paper"

app = CommandApp(
    help="Train image diffusion models on patches with Ray, and keep every run and model in MLflow.",
    epilog="Example: patchloom train --help",
)
autoencoder_app = CommandApp(
    help="Train your own autoencoder.",
    epilog="Example: patchloom autoencoder train dataset --out ae --register my-vae",
)

app.add_command(demo, job=FIRST_STEPS, example="patchloom demo --pixels --out demo")
app.add_command(doctor, job=FIRST_STEPS, example="patchloom doctor")
app.add_command(completion, job=FIRST_STEPS, has_output_options=False, example='eval "$(patchloom completion bash)"')
app.add_command(prepare, job=ON_DATA, example="patchloom prepare photos.zip dataset --resolution 64 --crop center")
app.add_command(inspect, job=ON_DATA, example="patchloom inspect dataset")
app.add_typer(autoencoder_app, name="autoencoder", rich_help_panel=ON_DATA)
autoencoder_app.add_command(
    autoencoder_train, "train", example="patchloom autoencoder train dataset --out ae --register my-vae"
)
app.add_command(recipes, job=ON_TRAINING, example="patchloom recipes")
app.add_command(
    train,
    job=ON_TRAINING,
    example="patchloom train demo_pixels --data dataset --out run --set patches.p=0.25 --workers 2",
)
app.add_command(tune, job=ON_TRAINING, example="patchloom tune demo_pixels_search --data dataset --out search")
app.add_typer(models_app, name="models", rich_help_panel=ON_MODELS)
app.add_command(sample, job=ON_MODELS, example="patchloom sample models:/my-model@champion samples --seeds 0-63")
app.add_command(evaluate, job=ON_MODELS, example="patchloom evaluate samples --reference dataset")
app.add_command(report, job=ON_MODELS, example="patchloom report run report.html")
app.add_typer(launch_app, name="launch", rich_help_panel=ON_MACHINES)
app.add_typer(cache_app, name="cache", rich_help_panel=ON_MACHINES)
app.add_command(
    benchmark, job=ON_MACHINES, has_output_options=False, example="patchloom benchmark train.sizes sample --json"
)
app.add_command(reproduce, job=ON_MACHINES, example="patchloom reproduce figure2 --small --dry-run")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version, then exit")] = False,
) -> None:
    if version:
        print(f"patchloom {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line and exit.

    Exit codes: 0 done; 2 a mistake of the user, printed as one line; 1 a failure of Patchloom, with its traceback;
    130 and 143 stopped by Ctrl-C or SIGTERM.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = RedactedStream(streams[0], is_plain=True), RedactedStream(streams[1])
    try:
        _main()
    finally:
        sys.stdout, sys.stderr = streams


def _main() -> None:
    exit_on_sigterm()
    prepare_completion()
    try:
        if os.environ.get("PATCHLOOM_ENV_FILE"):
            from patchloom.platform.compute.session import read_environment_file

            read_environment_file()
        code: Any = typer.main.get_command(app)(prog_name="patchloom", standalone_mode=False)
    except KeyboardInterrupt:
        _exit_interrupted()
    except Stopped as error:
        _exit(f"stopped; {error}", TERMINATED)
    except WorkersFailed as error:
        print(f"patchloom: {printable(str(error))}", file=sys.stderr)  # with the last lines of a log
        sys.exit(1)
    except SystemExit as error:
        if isinstance(error, Terminated) or error.code == signal.SIGTERM:  # the latter while Ray starts
            _exit(f"stopped by SIGTERM; {CONTINUE}", TERMINATED)
        raise
    except Exception as error:
        if type(error).__name__ == "Abort":  # how typer reports Ctrl-C
            _exit_interrupted()
        message = _usage_error(error) or _user_error(error)
        if message is not None:
            if is_verbose():
                print(printable(traceback.format_exc()), file=sys.stderr)
            _exit(message, 2)
        print(printable(traceback.format_exc()), file=sys.stderr)
        sys.exit(1)
    if code == INTERRUPTED:  # how newer versions of typer report Ctrl-C
        _exit_interrupted()
    sys.exit(code if isinstance(code, int) else 0)


def _exit(message: str, code: int) -> NoReturn:
    print(f"patchloom: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)


def _exit_interrupted() -> NoReturn:
    _exit(f"stopped; {CONTINUE}", INTERRUPTED)


def _usage_error(error: Exception) -> str | None:
    """The message of a wrong command line. Its exception classes are click's or typer's own, depending on typer."""
    if not hasattr(error, "format_message"):
        return None
    message = str(error.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "patchloom"
    return f"{message}; see `{command} --help`"


def _user_error(error: BaseException) -> str | None:
    """The message of a UserError, also if Ray wrapped it in an exception of its own, or of an answer of MLflow."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, UserError):
            return str(found)
        if isinstance(found, OSError) and found.errno in DISK_PROBLEMS:
            place = f" {found.filename}" if found.filename else ""
            return f"the disk cannot be written{place} ({found.strerror}): {DISK_PROBLEMS[found.errno]}; {CONTINUE}"
        found = getattr(found, "cause", None) or found.__cause__
    if type(error).__module__ != "mlflow.exceptions":
        return None
    from patchloom.platform.tracking.server_errors import problem_of_server

    return problem_of_server(error)
