"""Reproducing: runs the commands of a table one after the other, and writes a page that compares it with the paper."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from markupsafe import Markup

from patchloom import __version__
from patchloom.errors import UserError, WorkersFailed, did_you_mean
from patchloom.pipelines.pages.html import document, is_for_pages
from patchloom.pipelines.recipes import TWO_CORES_RATE
from patchloom.pipelines.reproduce.outcome import Outcome
from patchloom.pipelines.reproduce.paper import DATA
from patchloom.pipelines.reproduce.stages import ReproductionFolder, Stage
from patchloom.pipelines.reproduce.subjects import SUBJECTS, Subject
from patchloom.pipelines.train.dry_run import gpu_hours_text
from patchloom.platform.compute.hardware import machine_words
from patchloom.platform.dataset.prepared import is_dataset
from patchloom.platform.files.copies import local_copy
from patchloom.platform.files.fence import fenced
from patchloom.platform.files.folder import Folder
from patchloom.platform.files.outputs import check_output_folder
from patchloom.platform.files.storage import locked, make_folder, write_atomic
from patchloom.platform.progress import clock, is_quiet, say
from patchloom.platform.records.reproduction import REPRODUCTION_FILE, Reproduction
from patchloom.platform.tracking.client import require_reachable
from patchloom.platform.tracking.origin import code_commit
from patchloom.redaction import redacted

REPRODUCTION_PAGE = "report.html"
RGB = 3
MANY_BYTES = 10e9  # of prepared pixels, above which a plan says how many there are
TERMINATE_WAIT_S = 60.0
_INTERRUPTED, _MISTAKE = 130, 2  # exit codes of commands


@dataclass(frozen=True)
class ReproductionOptions:
    """How a table is reproduced.

    Args:
        small: make the same comparison with small networks, on two CPU cores in an hour or two.
        data: sources of images by the paper's names (`celeba`, `cat`, ...), or one source for the first of them by "".
            They may be prepared datasets of pixels. With `small`, photographs replace all if none is given.
        autoencoder: for tables of latents: models:/..., a folder or a hub id. Default: Stable Diffusion's; with
            `small`, one that is trained on the data.
        features: features of the metrics, as `evaluate` takes them. Default: `inception`; `colours` with `small`.
        model: for subjects that only sample: a finished model, instead of one that is trained.
        workers: workers of each training. Default: those of `train` and `tune`.
    """

    small: bool = False
    data: Mapping[str, str] = field(default_factory=dict)
    autoencoder: str | None = None
    features: str | None = None
    model: str | None = None
    workers: int | None = None

    @property
    def for_subjects(self) -> dict[str, str | None]:
        """The options that not every subject takes."""
        return {"model": self.model, "autoencoder": self.autoencoder, "features": self.features}


DEFAULT_OPTIONS = ReproductionOptions()


def reproduce(table: str, out: str | None = None, options: ReproductionOptions = DEFAULT_OPTIONS) -> Path:
    """Reproduce a table or figure of the paper, and write a page that compares it with the paper.

    Each stage is a command, which is printed. A call after an interruption continues with the stage that was stopped.

    Args:
        table: a name in `SUBJECTS`, such as `table4`.
        out: the folder to write; may be remote. Default: the name of the table, with `-small` if it is small.
        options: in which size, from which data, and with which models.

    Returns:
        The path of the page; for a remote folder of a local copy.

    Raises:
        UserError: the table is unknown, data are missing, a command refused its input, or the folder contains
            something else.
        WorkersFailed: a command failed.
    """
    subject, place = _planned(table, out, options)
    folder = place.folder
    check_output_folder(folder, "reproduction", REPRODUCTION_FILE)
    if folder.has(REPRODUCTION_FILE):
        begun = Reproduction.read(folder)
        if not begun.same_work(place.asked):
            raise UserError(f"{folder} has another reproduction ({_described(begun)}): choose another --out")
        place = place.with_asked(place.asked.continuing(begun))
    else:
        place = place.with_asked(place.asked.model_copy(update=_origin()))
    require_reachable()
    stages = subject.stages(place)
    say(_estimate(subject, place, stages).summary)
    with fenced(folder), nullcontext() if folder.is_remote else locked(make_folder(folder.path)):
        place = _run_stages(place, stages)
        place = place.with_asked(place.asked.model_copy(update={"finished": True}))
        place.asked.write(folder)
    here = local_copy(folder.address, is_for_pages)
    outcome = subject.outcome(place, here)
    write_atomic(here / REPRODUCTION_PAGE, document(_title(place.asked), _section(outcome, place)))
    if folder.is_remote:
        folder.put(here / REPRODUCTION_PAGE, REPRODUCTION_PAGE)
    say(f"\n{outcome.text()}\n\nOpen {folder}/{REPRODUCTION_PAGE}", is_result=True)
    return here / REPRODUCTION_PAGE


def _origin() -> dict[str, str]:
    """The machine and the code of a new reproduction, as fields of its record."""
    return {"machine": machine_words(), "code_version": __version__, "code_commit": code_commit()}


def _run_stages(place: ReproductionFolder, stages: Sequence[Stage]) -> ReproductionFolder:
    """Run the commands that have not finished; returns the folder with all of them finished."""
    place.asked.write(place.folder)
    for number, stage in enumerate(stages, 1):
        say(f"\n[{number}/{len(stages)}] {stage.title}\n  $ {_shown(stage, place.folder)}")
        known = place.asked.seconds(redacted(stage.command))
        if known is not None:
            say(f"  done before, in {clock(known)}")
            continue
        if stage.needs and not place.folder.has(stage.needs):
            say(f"  left out: there is no {stage.needs}, because its training failed")
            continue
        began = time.monotonic()
        _run(stage, place.folder)
        place = place.with_asked(place.asked.with_stage(redacted(stage.command), time.monotonic() - began))
        place.asked.write(place.folder)
    return place


@dataclass(frozen=True)
class PlannedStage:
    """A stage that would run.

    Args:
        title: what it does.
        command: a line for a shell.
        flops: its expected FLOPs; 0 for a negligible amount.
    """

    title: str
    command: str
    flops: float


@dataclass(frozen=True)
class ReproductionEstimate:
    """What a reproduction is expected to do: the result of `patchloom reproduce --dry-run`.

    Args:
        title: what is reproduced, as a sentence.
        small: whether it is the small one.
        stages: its commands in order.
        notes: what else it needs, as sentences.
    """

    title: str
    small: bool
    stages: tuple[PlannedStage, ...]
    notes: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Expected FLOPs of all stages."""
        return sum(stage.flops for stage in self.stages)

    @property
    def summary(self) -> str:
        """What is reproduced and what it costs."""
        cost = f"{self.flops:.3g} FLOPs, {gpu_hours_text(self.flops)}; metrics and data are extra"
        if self.small:
            rate = f"at {TWO_CORES_RATE / 1e9:g} GFLOP/s of two cores"
            time_text = clock(self.flops / TWO_CORES_RATE)
            cost = f"{self.flops / 1e12:,.0f} TFLOP, about {time_text} {rate}; starts and data are extra"
        return "\n".join([self.title, *(f"  {line}" for line in (cost, *self.notes))])

    @property
    def text(self) -> str:
        """The summary and the commands."""
        commands = [
            f"[{number}/{len(self.stages)}] {stage.title}\n  $ {stage.command}"
            for number, stage in enumerate(self.stages, 1)
        ]
        return "\n".join([self.summary, *commands])


def describe_reproduction(
    table: str, out: str | None = None, options: ReproductionOptions = DEFAULT_OPTIONS
) -> ReproductionEstimate:
    """The cost and the commands of a reproduction. At full size it needs no data.

    Args:
        table: a name in `SUBJECTS`, such as `table4`.
        out: the folder that would be written.
        options: in which size, from which data, and with which models.

    Raises:
        UserError: the table is unknown, or data are missing.
    """
    subject = _subject(table)
    if not options.small and not options.data:
        options = replace(options, data={name: name.upper() for name in subject.data})  # what a user puts there
    subject, place = _planned(table, out, options)
    return _estimate(subject, place, subject.stages(place))


def reproduction_section(folder: str, here: Path) -> tuple[str, Markup]:
    """The title and the body of the page of a finished reproduction.

    Args:
        folder: its address.
        here: a local folder with its cards; pictures are written there.

    Raises:
        UserError: it is not finished.
    """
    asked = Reproduction.read(Folder.at(folder))
    if not asked.finished:
        raise UserError(
            f"{folder} is not finished: run `patchloom reproduce {asked.table}` again with the same options"
        )
    place = ReproductionFolder(Folder.at(folder), asked)
    return _title(asked), _section(SUBJECTS[asked.table].outcome(place, here), place)


def _section(outcome: Outcome, place: ReproductionFolder) -> Markup:
    """The body of a page, with commands as they run next to the folder."""
    address, name = place.folder.address, place.folder.name
    commands = [stage.command.replace(address, name) for stage in place.asked.stages]
    return outcome.section(commands, reproduce_command(place.asked, name), place.asked.origin)


def reproduce_command(asked: Reproduction, name: str) -> str:
    """The command of a reproduction into a folder of this name, without the options of its machine."""
    words = ["patchloom", "reproduce", asked.table, *["--small"] * asked.small, "--out", name]
    for data, source in asked.data.items():
        words += ["--data", f"{data}={source}"]
    options = {"autoencoder": asked.autoencoder, "features": asked.features, "model": asked.model}
    taken = SUBJECTS[asked.table].options(asked.small)
    words += [word for option, value in options.items() if value and option in taken for word in (f"--{option}", value)]
    return redacted(shlex.join(words))


def _title(asked: Reproduction) -> str:
    return f"{SUBJECTS[asked.table].title} of Patch Diffusion{', at small scale' if asked.small else ''}"


def _subject(table: str) -> Subject:
    if table not in SUBJECTS:
        close = did_you_mean(table, SUBJECTS)
        raise UserError(f"{table} cannot be reproduced{close}: choose from {', '.join(SUBJECTS)}")
    return SUBJECTS[table]


def _planned(table: str, out: str | None, options: ReproductionOptions) -> tuple[Subject, ReproductionFolder]:
    subject, small, model = _subject(table), options.small, options.model
    sources = _named(subject, options.data)
    if not small and not sources and model is None:
        wanted = " ".join(f"--data {name}=SOURCE" for name in subject.data)
        raise UserError(f"{table} at full size needs data: give {wanted}, one of them, or --small")
    for name, value in options.for_subjects.items():
        if value is not None and name not in subject.options(small):
            raise UserError(f"--{name} {value} has no effect on {table}{' --small' if small else ''}: leave it out")
    folder = Folder.at(out or f"{table}{'-small' if small else ''}")
    if folder.is_remote and not sources:
        raise UserError(f"--out {folder} is remote, and the photographs are on this machine: give --data")
    asked = Reproduction(
        table=table, small=small, data=sources, autoencoder=options.autoencoder, model=model,
        features=options.features or ("colours" if small else "inception"),
    )  # fmt: skip
    return subject, ReproductionFolder(folder, asked, options.workers)


def _named(subject: Subject, data: Mapping[str, str]) -> dict[str, str]:
    """Sources by the paper's names."""
    named = {name or subject.data[0]: source for name, source in data.items()}
    unknown = [name for name in named if name not in subject.data]
    if unknown:
        raise UserError(f"--data {unknown[0]}=...: the data of {subject.title} are {', '.join(subject.data)}")
    for name, source in named.items():
        folder = Folder.at(source)
        missing = not folder.is_remote and not folder.path.exists() and source != name.upper()
        if missing:
            raise UserError(f"--data {name}={source} does not exist: give images or a prepared dataset")
    return named


def _described(asked: Reproduction) -> str:
    parts = [
        asked.table,
        *(["small"] if asked.small else []),
        *(f"{name}={source}" for name, source in asked.data.items()),
    ]
    return ", ".join(parts)


def _estimate(subject: Subject, place: ReproductionFolder, stages: Sequence[Stage]) -> ReproductionEstimate:
    planned = tuple(PlannedStage(stage.title, _shown(stage, place.folder), stage.flops) for stage in stages)
    title = f"{_title(place.asked)}: {subject.text}"
    return ReproductionEstimate(title, place.asked.small, planned, tuple(_data_notes(place)))


def _data_notes(place: ReproductionFolder) -> Iterator[str]:
    if place.asked.small:
        if not place.asked.data and place.asked.model is None:
            yield "data: photographs that ship with scikit-image; --data takes yours"
        return
    pixels = {
        name: DATA[name].images * DATA[name].resolution ** 2 * RGB
        for name in place.asked.data
        if name in DATA and not is_dataset(Folder.at(place.asked.data[name]))
    }
    if sum(pixels.values()) > MANY_BYTES:
        yield f"about {sum(pixels.values()) / 1e9:,.0f} GB of prepared pixels"


def _shown(stage: Stage, folder: Folder) -> str:
    """A command with the path of the folder relative to where this command runs."""
    return stage.command if folder.is_remote else stage.command.replace(folder.address, os.path.relpath(folder.path))


def _run(stage: Stage, folder: Folder) -> None:
    """Run a command to its end. It continues what an earlier call began, and ends with this process."""
    if stage.before:
        stage.before()
    words = list(stage.words)
    if stage.again and folder.has(stage.card):
        words.append(stage.again)
    process = subprocess.Popen(
        [sys.executable, "-m", stage.module, *words],
        env={**os.environ, **dict(stage.environment)},
        stdout=_messages_file(),
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the command, too
        process.wait()
        raise
    except BaseException:
        process.terminate()
        try:
            process.wait(TERMINATE_WAIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if code in (_INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        problem = f"`{stage.command}` {'was refused' if code == _MISTAKE else f'failed with exit code {code}'}"
        raise (UserError if code == _MISTAKE else WorkersFailed)(f"{problem}, see above; {_CONTINUE}")


def _messages_file() -> int | None:
    """Where a command prints: where this process prints messages (stderr with --json), or nowhere with --quiet."""
    if is_quiet():
        return subprocess.DEVNULL
    try:
        return sys.stdout.fileno()
    except (AttributeError, OSError):  # a notebook's or a test's stdout is no file
        return None


_CONTINUE = "correct that, then run the same command again to continue with this stage"
