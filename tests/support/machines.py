"""Machines: separate hosts on this one. Each has its own network address, processes, shared memory, /tmp and host name.

They are Linux namespaces joined by a bridge. Making them needs root and iproute2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0"
GATEWAY = f"{NETWORK}.1"  # the address of this machine on the bridge
BRIDGE = "patchloom0"
RAY_PORT, DASHBOARD_PORT, MLFLOW_PORT = 6379, 8265, 5600
START_TIMEOUT_S = 120.0
DISK_MIB = 8192  # a limit, not reserved
WITH_TESTS = ("setpriv", "--pdeathsig", "KILL")  # before a command that ends together with the tests
OBJECT_STORE_BYTES = 150 << 20
TOKEN = "0123456789abcdef" * 4


def missing_tools() -> list[str]:
    """What this machine lacks to make others: names of tools, or `root`."""
    tools = [
        name for name in ("ip", "setpriv", "unshare", "nsenter", "mount", "hostname") if shutil.which(name) is None
    ]
    return tools + ([] if os.geteuid() == 0 else ["root"])


@dataclass
class Machine:
    """One host. Commands run on it as on a computer of its own; its files in /tmp are not seen elsewhere.

    Args:
        name: its host name, which no name server knows.
        number: the last part of its address.
        environment: variables of every command on it.
    """

    name: str
    number: int
    environment: dict[str, str] = field(default_factory=dict)
    _init: "subprocess.Popen[bytes] | None" = None

    @property
    def address(self) -> str:
        """Its network address."""
        return f"{NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        """The name of its network namespace."""
        return f"patchloom-{self.name}"

    @property
    def wire(self) -> str:
        """The name of its end of the cable at the bridge."""
        return f"plw{self.number}"

    def boot(self) -> "Machine":
        """Connect it to the bridge and start its first process, whose death ends all others."""
        _ip(f"netns add {self.namespace}")
        _ip(f"link add {self.wire} type veth peer name eth0 netns {self.namespace}")
        _ip(f"link set {self.wire} master {BRIDGE} up")
        for command in ("link set lo up", f"addr add {self.address}/24 dev eth0", "link set eth0 up",
                        f"route add default via {GATEWAY}"):  # fmt: skip
            _ip(f"-n {self.namespace} {command}")
        setup = (
            f"hostname {self.name} && mount --bind {ROOT} /mnt"
            f" && mount -t tmpfs -o size={DISK_MIB}m tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm"
            f" && mkdir -p {ROOT} && mount --bind /mnt {ROOT}"  # the code may be below /tmp
            " && mkdir /tmp/home && echo booted && exec sleep infinity"
        )
        self._init = subprocess.Popen(
            [*WITH_TESTS, "ip", "netns", "exec", self.namespace,
             "unshare", "--pid", "--mount", "--ipc", "--uts", "--fork",
             "--kill-child", "--mount-proc", "sh", "-c", setup],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._init.stdout is not None and self._init.stdout.readline() == b"booted\n"
        return self

    def popen(self, command: Sequence[str], cwd: str = "/tmp/home", **environment: str) -> "subprocess.Popen[str]":
        """Start a command on it; stdout and stderr are one pipe."""
        (first,) = psutil.Process(self._running().pid).children()  # unshare's child is the first process
        enter = ["nsenter", f"--target={first.pid}", "--net", "--mount", "--pid", "--ipc", "--uts"]
        return subprocess.Popen(
            [*enter, "sh", "-c", 'cd "$0" && exec "$@"', cwd, *command],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | {"HOME": "/tmp/home"} | self.environment | environment,
        )  # fmt: skip

    def run(
        self, command: Sequence[str], timeout_s: float = 300, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command on it to its end."""
        process = self.popen(command, **environment)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            raise AssertionError(f"{command} took longer than {timeout_s} s:\n{output}") from None
        return subprocess.CompletedProcess(command, process.returncode, output)

    def write(self, path: str, text: str) -> None:
        """Write a file on it."""
        done = self.run([sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", path, text])
        assert done.returncode == 0, done.stdout

    def start_ray(self, *options: str) -> None:
        """Start the processes of a node of Ray. `options` are those of `ray start`."""
        ray, memory = str(Path(sys.executable).with_name("ray")), f"--object-store-memory={OBJECT_STORE_BYTES}"
        done = self.run([ray, "start", f"--node-ip-address={self.address}", memory, *options])
        assert done.returncode == 0, f"Ray on {self.name} did not start: {done.stdout}"

    def cut_off(self) -> None:
        """Pull its network cable. It goes on running."""
        _ip(f"link set {self.wire} down")

    def reconnect(self) -> None:
        """Plug its network cable in again."""
        _ip(f"link set {self.wire} up")

    def kill(self) -> None:
        """Take its power away: all its processes end at once, and its /tmp is lost."""
        init = self._running()
        init.send_signal(signal.SIGKILL)  # --kill-child ends the first process, and that all others
        init.wait()
        self._init = None
        subprocess.run(["ip", "netns", "delete", self.namespace], check=False)

    @property
    def runs(self) -> bool:
        """Whether it was booted and not killed."""
        return self._init is not None

    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._init is not None, f"{self.name} does not run"
        return self._init


class Network:
    """A bridge with machines, which all end with the block."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.machines: list[Machine] = []

    def __enter__(self) -> "Network":
        _remove_leftovers()
        _ip(f"link add {BRIDGE} type bridge")
        _ip(f"addr add {GATEWAY}/24 dev {BRIDGE}")
        _ip(f"link set {BRIDGE} up")
        return self

    def __exit__(self, *_: object) -> None:
        for machine in self.machines:
            if machine.runs:
                machine.kill()
        _ip(f"link delete {BRIDGE}")

    def boot(self, name: str) -> Machine:
        """A new machine. A name that was used and killed gets a new address."""
        machine = Machine(name, 10 + len(self.machines), dict(self.environment)).boot()
        self.machines.append(machine)
        return machine


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.2)


def cpus(machine: Machine, address: str) -> int:
    """The CPUs of the nodes that Ray considers alive, asked on a machine; -1 if it does not answer."""
    code = "import ray; ray.init(logging_level='ERROR'); print('CPUS', int(ray.cluster_resources().get('CPU', 0)))"
    done = machine.run([sys.executable, "-c", code], RAY_ADDRESS=address)
    return int(done.stdout.rpartition("CPUS")[2]) if "CPUS" in done.stdout else -1


def answers(url: str) -> bool:
    """Whether a server answers a request, with whatever status."""
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@dataclass
class TrackingServer:
    """An MLflow server on PostgreSQL, with artifacts in the store."""

    command: list[str]
    environment: dict[str, str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def address(self) -> str:
        """Its address."""
        return f"http://{GATEWAY}:{MLFLOW_PORT}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stdout=log, stderr=log)
        wait_for(lambda: answers(f"{self.address}/health"), "MLflow")

    def stop(self) -> None:
        """Stop the server, as for an upgrade."""
        assert self.process is not None
        self.process.terminate()
        self.process.wait()


class RayCluster:
    """A head without CPUs, and workers with one CPU each."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.head = network.boot(f"head{len(network.machines)}")
        self.head.start_ray("--head", "--num-cpus=0", f"--port={RAY_PORT}", "--dashboard-host=0.0.0.0")
        self.workers: dict[str, Machine] = {}

    @property
    def address(self) -> str:
        """The address of Ray."""
        return f"{self.head.address}:{RAY_PORT}"

    @property
    def job_address(self) -> str:
        """The address for job submission."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def add(self, name: str) -> None:
        """Start a worker node."""
        self.workers[name] = self.network.boot(f"{name}{len(self.network.machines)}")
        self.workers[name].start_ray(f"--address={self.address}", "--num-cpus=1")

    def kill(self, name: str) -> None:
        """Take the power of a worker node away."""
        self.workers.pop(name).kill()

    def end(self) -> None:
        """Take the power of all its machines away."""
        for machine in (self.head, *self.workers.values()):
            if machine.runs:
                machine.kill()

    def set_workers(self, *names: str) -> None:
        """Have exactly these worker nodes alive."""
        for name in set(self.workers) - set(names):
            self.kill(name)
        for name in names:
            if name not in self.workers:
                self.add(name)
        wait_for(lambda: cpus(self.head, self.address) == len(names), f"{len(names)} nodes")

    def start(self, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        """Start a command of Patchloom on the head node."""
        command = [sys.executable, "-m", "patchloom.pipelines.cli", *arguments]
        return self.head.popen(command, RAY_ADDRESS=self.address, **environment)

    def run(self, *arguments: str, timeout_s: float = 420, **environment: str) -> str:
        """Run a command of Patchloom on the head node, which must succeed; returns what it printed."""
        command = [sys.executable, "-m", "patchloom.pipelines.cli", *arguments]
        done = self.head.run(command, timeout_s, RAY_ADDRESS=self.address, **environment)
        assert done.returncode == 0, done.stdout
        return done.stdout


def _remove_leftovers() -> None:
    """Remove the machines of tests that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for name in [line.split()[0] for line in listed.splitlines() if line.startswith("patchloom-")]:
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
        for process in found.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=False)
    listed = subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True).stdout
    for wire in [line.split("@")[0] for line in listed.splitlines() if line.startswith("plw")]:
        subprocess.run(["ip", "link", "delete", wire], check=False)
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)


def _ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr}"
