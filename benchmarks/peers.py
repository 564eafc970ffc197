"""Peer benchmark: full-size training, compared with the training loops of other packages at equal parameters and FLOPs.

Each package runs in its own process (`peer_process.py`). If this environment lacks the package, another one is created
in the cache, once. One process works at a time, and all have the same number of threads, images and pixels.
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

from patchloom.benchmarks import peer_process
from patchloom.benchmarks.findings import TINY, Finding, Say, Scale
from patchloom.benchmarks.interleaved import Work, interleave
from patchloom.benchmarks.peer_process import GROUPS, ForwardCost, Request, Setting, TrainedSteps
from patchloom.benchmarks.setups import DROPOUT, Trainer, representative_steps, song_config, step_settings
from patchloom.models.flops import parameter_count, training_flops
from patchloom.models.step_plan import StepSettings
from patchloom.platform import progress
from patchloom.platform.files.cache import cache_folder
from patchloom.platform.files.storage import locked, sweep_partial, whole_folder

STEPS, MIXED_STEPS = 5, 10  # per round: full-size steps, and steps at p = .5 (5 full, 3 half and 2 quarter)
OWN_TORCH_GIB = 30  # of free disk space to install another torch; it takes about 5
LOCK_WAIT_S = 3600.0  # while another benchmark creates the same environment


@dataclass(frozen=True)
class Package:
    """A package to compare with: its names, what pip installs, and what must import."""

    name: str  # in `peer_process.py`
    title: str
    network: str
    requirements: tuple[str, ...]
    imports: str
    minimal_imports: str  # enough if pip cannot install the requirements


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


class Unavailable(Exception):
    """A package that cannot be measured here. The message is the reason."""


def against_peers(scale: Scale, say: Say) -> list[Finding]:
    """Images per second of Patchloom at p = 1 and at p = .5, compared with each package.

    Patchloom keeps freed memory, as its commands do (see `keep_freed_memory`). Other packages use their defaults.
    """
    with ExitStack() as stack:
        our_size, alternatives = our_alternatives(scale)
        matches = [match for package in PACKAGES for match in peer_matches(package, scale, our_size, stack)]
        timings = interleave(alternatives | {match.name: match.train for match in matches}, scale.rounds, 1, say)
    found = [
        Finding("Patchloom, p = 1", timings.rate("p = 1"), "images/s"),
        Finding("Patchloom, p = 0.5", timings.rate("p = 0.5"), "counted images/s"),
    ]
    for match in matches:
        found.append(Finding(f"{match.name} ({match.description})", timings.rate(match.name), "images/s"))
        found += [Finding(f"  {ours} over {match.name}", timings.ratio(ours, match.name), "x") for ours in alternatives]
    return found


@dataclass(frozen=True)
class NetworkSize:
    """The parameters of a network, and its training FLOPs per image."""

    parameters: int
    flops: int


@dataclass(frozen=True)
class Match:
    """A package's network at the chosen width, ready to train."""

    name: str
    description: str
    train: Work


def our_alternatives(scale: Scale) -> tuple[NetworkSize, dict[str, Work]]:
    """The size of Patchloom's network, and its steps at p = 1 and at p = .5."""
    config = song_config(scale.side, scale.width, scale.blocks)
    mixed, full = step_settings(scale, 0.5), step_settings(scale, 1.0)
    trainer = Trainer(config, mixed)
    size = NetworkSize(parameter_count(trainer.denoiser), training_flops(config, scale.side))
    return size, {"p = 1": _steps_of(trainer, full, STEPS), "p = 0.5": _steps_of(trainer, mixed, MIXED_STEPS)}


def _steps_of(trainer: Trainer, settings: StepSettings, steps: int) -> Work:
    plans = representative_steps(settings, steps)
    return lambda: trainer.steps(plans, settings)


def peer_matches(package: Package, scale: Scale, ours: NetworkSize, stack: ExitStack) -> list[Match]:
    """The networks of a package with about equal parameters and FLOPs; none, with a warning, if the package fails."""
    try:
        python = interpreter_for(package, wants_numbers(scale))
        peer = stack.enter_context(PeerProcess(python, package.name, setting_for(scale)))
        return choose_widths(package, peer, ours)
    except Unavailable as why:
        progress.say(f"  {package.title} skipped: {why}")
        return []


def wants_numbers(scale: Scale) -> bool:
    """Whether this is a measurement, not only a check that everything runs."""
    return replace(scale, rounds=TINY.rounds) != TINY


def setting_for(scale: Scale) -> Setting:
    """The options that all networks share."""
    options = song_config(scale.side, scale.width, scale.blocks).network_options
    return Setting(scale.side, scale.batch, options["width_multipliers"], scale.blocks, options["attention"], DROPOUT,
                   torch.get_num_threads())  # fmt: skip


def choose_widths(package: Package, peer: "PeerProcess", ours: NetworkSize) -> list[Match]:
    """The networks with the nearest parameters and the nearest FLOPs, started; they may be the same network."""
    by_parameters = nearest_width(lambda width: peer.size(width).parameters, ours.parameters)
    by_flops = nearest_width(lambda width: peer.size(width).flops, ours.flops)
    reasons = {by_parameters: "parameters", by_flops: "FLOPs"}
    if by_parameters == by_flops:
        reasons = {by_flops: "parameters and FLOPs"}
    matches = []
    for width, reason in reasons.items():
        peer.train(width, 1)  # a failure shows before the measurement
        parameters, flops = peer.size(width).parameters / ours.parameters, peer.size(width).flops / ours.flops
        name = f"{package.title} at {parameters:.2f}x the parameters, {flops:.2f}x the FLOPs"
        description = f"{package.network}, width {width}, nearest in {reason}{peer.differences}"
        matches.append(Match(name, description, functools.partial(peer.train, width, STEPS)))
    return matches


def nearest_width(count: Callable[[int], int], wanted: int) -> int:
    """The multiple of GROUPS for which `count` is nearest to `wanted`, by ratio; `count` grows with the width."""
    below = width = GROUPS
    while count(width) < wanted:
        below, width = width, width + GROUPS
    return min(below, width, key=lambda candidate: abs(math.log(count(candidate) / wanted)))


class PeerProcess:
    """`peer_process.py` in an environment. A request raises Unavailable, with the error, if the process has ended."""

    def __init__(self, python: str, package: str, setting: Setting) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in __exit__
        script = str(Path(peer_process.__file__).resolve())
        command = [python, "-P", script, package, json.dumps(asdict(setting))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.size = functools.cache(self._size)

    def __enter__(self) -> Self:
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except Unavailable:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    @property
    def differences(self) -> str:
        """How the environment differs from the usual one, as a part of a sentence."""
        torches = "" if self.versions["torch"] == torch.__version__ else f"; on torch {self.versions['torch']}"
        return torches if "accelerate" in self.versions else f"{torches}; without accelerate"

    def _size(self, width: int) -> NetworkSize:
        """Parameters and training FLOPs per image: three times the forward pass, as for Patchloom's networks."""
        cost = ForwardCost(**self._ask(Request(count=width)))
        return NetworkSize(cost.parameters, 3 * cost.flops)

    def train(self, width: int, steps: int) -> int:
        """Take steps. Returns the number of images."""
        return TrainedSteps(**self._ask(Request(train=width, steps=steps))).images

    def _ask(self, request: Request) -> Any:
        assert self._process.stdin is not None
        try:
            print(json.dumps(asdict(request)), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise Unavailable(self._error()) from None
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable(self._error())
        return json.loads(line)

    def _error(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        return last_line(self._errors.read()) or f"its process ended with exit code {code}"


def interpreter_for(package: Package, may_add_torch: bool) -> str:
    """An interpreter with the package: this one, or one of an environment in the cache, created now if necessary.

    Args:
        package: the package.
        may_add_torch: install another torch if the package does not import with this one.

    Raises:
        Unavailable: no environment has the package.
    """
    if import_error(sys.executable, package.imports) is None:
        return sys.executable
    try:
        return environment_for(package, may_add_torch)
    except Unavailable as why:
        if import_error(sys.executable, package.minimal_imports) is not None:
            raise
        progress.say(f"  {', '.join(package.requirements)} cannot be installed ({why}): {package.title} runs without")
        return sys.executable


@dataclass(frozen=True)
class Environment:
    """The folder of an environment, its torch, and whether it uses the packages of this environment."""

    path: Path
    torch: str  # the requirement
    is_shared: bool

    @property
    def python(self) -> str:
        """The path of the interpreter."""
        return str(self.path / "bin" / "python")


def environments(package: Package) -> list[Environment]:
    """The environments to try: with this torch, then with the same release from the package index."""
    cache, installed = cache_folder("peers"), version("torch")
    release, python = installed.split("+")[0], f"python{sys.version_info.major}.{sys.version_info.minor}"
    prefix = f"{zlib.crc32(sys.prefix.encode()):08x}"
    return [
        Environment(cache / f"{package.name}-{python}-torch-{installed}-of-{prefix}", f"torch=={installed}", True),
        # `===` excludes local builds of that release, such as `+cpu`
        Environment(cache / f"{package.name}-{python}-torch-{release}-alone", f"torch==={release}", False),
    ]


def environment_for(package: Package, may_add_torch: bool) -> str:
    """The interpreter of an environment with this package: an existing one that works, else a new one."""
    shared, separate = environments(package)
    cache = shared.path.parent
    with locked(cache, wait_s=LOCK_WAIT_S):
        sweep_partial(cache)
        for existing in (shared, separate):
            if existing.path.is_dir() and import_error(existing.python, package.imports) is None:
                return existing.python
        why = create_environment(shared, package)
        if why is None:
            return shared.python
        if not may_add_torch:
            raise Unavailable(f"{why}; another torch is installed only for a measurement")
        _require_space(cache, why)
        progress.say(f"  it fails with torch {version('torch')} ({why}): installing {separate.torch}, about 5 GB, once")
        why = create_environment(separate, package)
    if why is not None:
        raise Unavailable(why)
    return separate.python


def _require_space(folder: Path, why: str) -> None:
    free = shutil.disk_usage(folder).free / 2**30
    if free < OWN_TORCH_GIB:
        raise Unavailable(f"{why}; another torch needs {OWN_TORCH_GIB} GiB of free space, and {folder} has {free:.0f}")


def create_environment(environment: Environment, package: Package) -> str | None:
    """Create an environment, complete or not at all. Returns the import error of the package, or None.

    Raises:
        Unavailable: pip cannot install the requirements.
    """
    progress.say(f"  creating an environment for {package.title}, once ({environment.path})")
    try:
        with whole_folder(environment.path) as folder:
            _install(folder, environment, package)
            why = import_error(str(folder / "bin" / "python"), package.imports)
            if why is not None:
                raise _ImportFails(why)
    except _ImportFails as error:
        return str(error)
    return None


class _ImportFails(Exception):
    """The package is installed and does not import."""


def _install(folder: Path, environment: Environment, package: Package) -> None:
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip"]
    if environment.is_shared:
        _run([*pip, "uninstall", "--quiet", "--yes", "setuptools"])  # the version of Python may be too old for torch
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (packages / "shared.pth").write_text("\n".join(_packages_of_this_python()))
    _run([*pip, "install", "--quiet", "--no-input", environment.torch, *package.requirements])


def _packages_of_this_python() -> list[str]:
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(last_line(done.stderr) or last_line(done.stdout) or f"{command[1:3]} failed")


def import_error(python: str, imports: str) -> str | None:
    """The error message of these imports in an environment; None if they succeed."""
    try:
        done = subprocess.run([python, "-P", "-c", imports], capture_output=True, text=True)
    except OSError as error:  # the Python of an old environment may be gone
        return str(error)
    return None if done.returncode == 0 else last_line(done.stderr) or f"exit code {done.returncode}"


def last_line(text: str) -> str:
    """The last line of a traceback or of pip's output, which is the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [""])[-1]
