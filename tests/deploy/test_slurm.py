"""deploy/slurm.sh on a real Slurm with two nodes, where the Debian package slurm-wlm is installed."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers import free_port, tiny_recipe

ROOT = Path(__file__).parents[2]
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
SlurmUser=root
SlurmdUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={one} CPUs=1 RealMemory=2000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={two} CPUs=1 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Slurm controller and two nodes on this machine. Yields the folder of its configuration."""
    if not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))) or os.geteuid():
        pytest.skip("needs root and Slurm (the Debian packages slurm-wlm and munge)")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    controller, one, two = free_port(), free_port(), free_port()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, controller=controller, one=one, two=two))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = ["munged", "--foreground", "--force", *(f"--{key}={folder}/munge.{name}" for key, name in names.items())]
    commands = [munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = []
    for command in commands:
        daemons.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(1)
    yield folder
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait(30)


def eventually(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(1)


@pytest.mark.slow
def test_a_job_is_requeued_with_a_checkpoint_continues_and_finishes(slurm: Path, pixels: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe().model_dump(mode="json")
    recipe["train"] |= {"images": 16_000, "checkpoint_every_images": 16_000, "log_every_images": 160}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    script = (ROOT / "deploy/slurm.sh").read_text().replace("#SBATCH --gpus-per-node=1\n", "")
    (tmp_path / "job.sh").write_text(script)
    environment = {
        **os.environ, "SLURM_CONF": str(slurm / "slurm.conf"), "PATCHLOOM_VENV": str(Path(sys.executable).parents[1]),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }  # fmt: skip

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.stdout

    train = ("recipe.yaml", "--data", str(pixels), "--out", str(tmp_path / "run"))
    job = run("sbatch", "--parsable", "--time=20", "job.sh", *train).strip()
    log, lines = tmp_path / f"patchloom-{job}.log", tmp_path / "run/progress.jsonl"
    eventually(lambda: (lines.is_file() and lines.read_text().count("\n") > 1) or not run("squeue", "--noheader"))
    run("scancel", "--batch", "--signal=USR1", job)  # what Slurm sends before the time limit
    eventually(lambda: "PENDING" in run("squeue", "--noheader", "--jobs", job, "--format=%T"))
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert not (tmp_path / "run/model").exists() and "goes back to the queue" in log.read_text()
    run("scontrol", "update", f"jobid={job}", "StartTime=now")  # Slurm waits two minutes otherwise
    eventually(lambda: (tmp_path / "run/model/model.json").is_file())
    eventually(lambda: "COMPLETED" in run("scontrol", "show", "job", job))
    assert "Restarts=1" in run("scontrol", "show", "job", job)
    assert int(checkpoint.name.removeprefix("step-")) > 0
    assert not Path(f"/tmp/ray-{job}").exists()
