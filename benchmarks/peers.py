"""Peers: images a second of full-size training beside other packages' own loops, at equal parameters and FLOPs.

Each package works in a process of its own (`peer.py`), and in an environment of its own where this one lacks it: below
the cache, made once, never in this one. Exactly one process works at a time, all with as many threads, images, pixels.
"""

import functools
import json
import math
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from patchloom.benchmarks import peer as child_script
from patchloom.benchmarks.findings import TINY, Finding, Say, Scale
from patchloom.benchmarks.paired import Work, in_turns
from patchloom.benchmarks.peer import GROUPS, Setting
from patchloom.benchmarks.setups import DROPOUT, Trainer, representative_steps, song_config, step_settings
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.step_plan import StepSettings
from patchloom.platform import progress
from patchloom.platform.files.copies import cache_folder
from patchloom.platform.files.storage import locked, sweep_partial, whole_folder

STEPS, MIXED_STEPS = 5, 10  # a turn: of full size, and of p = .5, 5 full, 3 half and 2 quarter
OWN_TORCH_GIB = 30  # of room, before a torch is installed once more; it takes about 5
MAKING_S = 3600.0  # at most, while another benchmark makes the same environment


@dataclass(frozen=True)
class Package:
    """A package to stand beside: as `peer.py` and people know it, what pip installs, and what must then import."""

    name: str
    title: str
    network: str
    requirements: tuple[str, ...]
    imports: str
    imports_at_least: str  # what it can do with, where pip has nothing


PACKAGES = (
    Package(
        "diffusers", "diffusers", "UNet2DModel", ("accelerate",),
        "import accelerate; from diffusers import UNet2DModel", "from diffusers import UNet2DModel",
    ),
    Package(
        "ddp", "denoising-diffusion-pytorch", "Unet", ("denoising-diffusion-pytorch",),
        "import denoising_diffusion_pytorch", "import denoising_diffusion_pytorch",
    ),
)  # fmt: skip


class NotHere(Exception):
    """A package that cannot be measured here; says why in a few words."""


def beside_peers(scale: Scale, say: Say) -> list[Finding]:
    """Our images a second at p = 1, and counted ones at p = .5, over each package's, all in turns.

    Ours keep freed memory, as the command does (see `keep_freed_memory`); others' run as people run them.
    """
    with ExitStack() as stack:
        ours, ways = our_ways(scale)
        matches = [match for package in PACKAGES for match in matches_of(package, scale, ours, stack)]
        turns = in_turns(ways | {match.name: match.train for match in matches}, scale.rounds, 1, say)
    found = [
        Finding("ours, p = 1", turns.rate("p = 1"), "images/s"),
        Finding("ours, p = 0.5", turns.rate("p = 0.5"), "counted images/s"),
    ]
    for match in matches:
        found.append(Finding(f"{match.name} ({match.words})", turns.rate(match.name), "images/s"))
        found += [Finding(f"  {way} over {match.name}", turns.ratio(way, match.name), "x") for way in ways]
    return found


@dataclass(frozen=True)
class Size:
    """A network's parameters, and its FLOPs of training on an image."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class Match:
    """A package's network at a width that was chosen, ready to train: what it is equal in, and how it was chosen."""

    name: str
    words: str
    train: Work


def our_ways(scale: Scale) -> tuple[Size, dict[str, Work]]:
    """How large our network is, and its steps at p = 1 and at p = .5."""
    config = song_config(scale.side, scale.width, scale.blocks)
    mixed, full = step_settings(scale, 0.5), step_settings(scale, 1.0)
    trainer = Trainer(config, mixed)
    size = Size(parameter_count(trainer.denoiser), training_flops(config, scale.side))
    return size, {"p = 1": _steps_of(trainer, full, STEPS), "p = 0.5": _steps_of(trainer, mixed, MIXED_STEPS)}


def _steps_of(trainer: Trainer, method: StepSettings, steps: int) -> Work:
    plans = representative_steps(method, steps)
    return lambda: trainer.steps(plans, method)


def matches_of(package: Package, scale: Scale, ours: Size, stack: ExitStack) -> list[Match]:
    """A package's networks of about our parameters and of about our FLOPs; none, and a word why, where it fails."""
    try:
        python = python_for(package, is_in_earnest(scale))
        child = stack.enter_context(Child(python, package.name, setting_of(scale)))
        return chosen(package, child, ours)
    except NotHere as why:
        progress.say(f"  {package.title} skipped: {why}")
        return []


def is_in_earnest(scale: Scale) -> bool:
    """Whether numbers are wanted, and not only to see that everything runs."""
    return replace(scale, rounds=TINY.rounds) != TINY


def setting_of(scale: Scale) -> Setting:
    """What the packages' networks are to have in common with ours."""
    options = song_config(scale.side, scale.width, scale.blocks)["network_options"]
    return Setting(scale.side, scale.batch, options["width_multipliers"], scale.blocks, options["attention"], DROPOUT,
                   torch.get_num_threads())  # fmt: skip


def chosen(package: Package, child: "Child", ours: Size) -> list[Match]:
    """The package's networks whose parameters and whose FLOPs are nearest ours, begun; it may be one network."""
    by_parameters = nearest_width(lambda width: child.size(width).parameters, ours.parameters)
    by_flops = nearest_width(lambda width: child.size(width).flops, ours.flops)
    meant = {by_parameters: "parameters", by_flops: "FLOPs"}
    if by_parameters == by_flops:
        meant = {by_flops: "parameters and FLOPs"}
    matches = []
    for width, what in meant.items():
        child.train(width, 1)  # what fails, fails before the turns begin
        parameters, flops = child.size(width).parameters / ours.parameters, child.size(width).flops / ours.flops
        name = f"{package.title} at {parameters:.2f}x our parameters, {flops:.2f}x our FLOPs"
        words = f"{package.network}, width {width}, nearest in {what}{child.differs}"
        matches.append(Match(name, words, functools.partial(child.train, width, STEPS)))
    return matches


def nearest_width(count: Callable[[int], int], wanted: int) -> int:
    """The multiple of GROUPS whose count, which grows with the width, has the ratio to `wanted` that is nearest 1."""
    below = width = GROUPS
    while count(width) < wanted:
        below, width = width, width + GROUPS
    return min(below, width, key=lambda one: abs(math.log(count(one) / wanted)))


class Child:
    """`peer.py` at work in an environment. Raises NotHere, with its last words, once it has ended."""

    def __init__(self, python: str, package: str, setting: Setting) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the child
        script = str(Path(child_script.__file__).resolve())
        command = [python, "-P", script, package, json.dumps(asdict(setting))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.size = functools.cache(self._size)

    def __enter__(self) -> Self:
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except NotHere:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    @property
    def differs(self) -> str:
        """What is not as one would expect, for a finding's words."""
        torches = "" if self.versions["torch"] == torch.__version__ else f"; on torch {self.versions['torch']}"
        return torches if "accelerate" in self.versions else f"{torches}; without accelerate"

    def _size(self, width: int) -> Size:
        """Parameters, and FLOPs of training on an image: three times those of the forward pass, as ours are counted."""
        counted = self._ask({"count": width})
        return Size(counted["parameters"], 3 * counted["flops"])

    def train(self, width: int, steps: int) -> int:
        """Take steps; gives the images of them."""
        images: int = self._ask({"train": width, "steps": steps})["images"]
        return images

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise NotHere(self._last_words()) from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NotHere(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        return last_line(self._errors.read()) or f"its process ended with exit code {code}"


def python_for(package: Package, may_add_torch: bool) -> str:
    """An interpreter that has the package: this one, else one of an environment that is kept or made now.

    may_add_torch: install a torch where the package does not import beside this one. Raises NotHere where none can
    be had.
    """
    if failure(sys.executable, package.imports) is None:
        return sys.executable
    try:
        return environment_of(package, may_add_torch)
    except NotHere as why:
        if failure(sys.executable, package.imports_at_least) is not None:
            raise
        progress.say(f"  {', '.join(package.requirements)} cannot be had ({why}): {package.title} goes without")
        return sys.executable


@dataclass(frozen=True)
class Environment:
    """Where an environment lies, and whether torch and the rest are this one's or are installed once more."""

    path: Path
    torch: str  # the requirement
    is_sharing: bool

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.path / "bin" / "python")


def environments(package: Package) -> list[Environment]:
    """What to try: this torch, and where the package does not import beside it, the same release from the index."""
    cache, installed = cache_folder("peers"), version("torch")
    release, python = installed.split("+")[0], f"python{sys.version_info.major}.{sys.version_info.minor}"
    here = f"{zlib.crc32(sys.prefix.encode()):08x}"
    return [
        Environment(cache / f"{package.name}-{python}-torch-{installed}-of-{here}", f"torch=={installed}", True),
        # `===` leaves out builds of that release with a name of their own, as `+cpu`
        Environment(cache / f"{package.name}-{python}-torch-{release}-alone", f"torch==={release}", False),
    ]


def environment_of(package: Package, may_add_torch: bool) -> str:
    """The interpreter of an environment with this package: one that still works, else a new one."""
    sharing, alone = environments(package)
    cache = sharing.path.parent
    with locked(cache, wait_s=MAKING_S):
        sweep_partial(cache)
        for kept in (sharing, alone):
            if kept.path.is_dir() and failure(kept.python, package.imports) is None:
                return kept.python
        why = made(sharing, package)
        if why is None:
            return sharing.python
        if not may_add_torch:
            raise NotHere(f"{why}; a torch of its own is installed only where numbers are wanted")
        _check_room(cache, why)
        progress.say(f"  beside torch {version('torch')} it fails ({why}): with {alone.torch}, about 5 GB, once")
        why = made(alone, package)
    if why is not None:
        raise NotHere(why)
    return alone.python


def _check_room(folder: Path, why: str) -> None:
    free = shutil.disk_usage(folder).free / 2**30
    if free < OWN_TORCH_GIB:
        raise NotHere(
            f"{why}; for an environment with a torch of its own {folder} must have {OWN_TORCH_GIB} GiB of room, and "
            f"has {free:.0f}"
        )


def made(environment: Environment, package: Package) -> str | None:
    """Make an environment, whole or not at all; gives why the package does not import in it, or None when it does.

    Raises NotHere where pip finds or installs nothing.
    """
    progress.say(f"  making an environment for {package.title}, once ({environment.path})")
    try:
        with whole_folder(environment.path) as folder:
            _install(folder, environment, package)
            why = failure(str(folder / "bin" / "python"), package.imports)
            if why is not None:
                raise _Unfit(why)
    except _Unfit as unfit:
        return str(unfit)
    return None


class _Unfit(Exception):
    """Installed, and of no use."""


def _install(folder: Path, environment: Environment, package: Package) -> None:
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    if environment.is_sharing:
        _run([*pip, "uninstall", "--quiet", "--yes", "setuptools"])  # one that Python brings may be too old for torch
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (packages / "sharing.pth").write_text("\n".join(_packages_of_this_python()))
    _run([*pip, "install", "--quiet", "--no-input", environment.torch, *package.requirements])


def _packages_of_this_python() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotHere(last_line(done.stderr) or last_line(done.stdout) or f"{command[1:3]} failed")


def failure(python: str, imports: str) -> str | None:
    """Why these imports fail in an environment, in its own last words; None where they succeed."""
    try:
        done = subprocess.run([python, "-P", "-c", imports], capture_output=True, text=True)
    except OSError as error:  # the Python that an old environment was made from may be gone
        return str(error)
    return None if done.returncode == 0 else last_line(done.stderr) or f"exit code {done.returncode}"


def last_line(text: str) -> str:
    """What a traceback or pip says last, and so what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1]
