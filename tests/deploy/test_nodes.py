"""The scripts and commands of nodes, run as `ray up`, compose and Slurm run them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import free_port, wait_until

from patchloom.pipelines.registry.wheel import wheel_bytes

ROOT = Path(__file__).parents[2]
NODE = ROOT / "deploy/node"
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def compose_service(name: str) -> Any:
    return yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"][name]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The home folder of a node after `ray up` copied its file_mounts, with an Ubuntu-like .bashrc."""
    (tmp_path / "patchloom/dist").mkdir(parents=True)
    shutil.copytree(NODE, tmp_path / "patchloom/node")
    shutil.copy(ROOT / "constraints.txt", tmp_path / "patchloom/dist")
    (tmp_path / "patchloom/dist/patchloom-0.1.0-py3-none-any.whl").write_bytes(wheel_bytes())
    (tmp_path / ".bashrc").write_text('case $- in *i*) ;; *) return ;; esac\nexport PS1="$ "\n')
    return tmp_path


def as_ray_up(command: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as Ray's command runner does over SSH."""
    from ray.autoscaler._private.command_runner import _with_interactive

    shell = " ".join(_with_interactive(command))
    environment = {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **variables}
    return subprocess.run(shell, shell=True, cwd=home, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_setup_makes_a_venv_and_every_shell_of_ray_finds_it(home: Path) -> None:
    (command,) = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["setup_commands"]
    for _ in range(2):  # `ray up` again: the same result
        done = as_ray_up(command, home, PIP_NO_DEPS="1")  # the dependencies take minutes
        assert done.returncode == 0, done.stderr
    shown = as_ray_up("command -v patchloom; env", home).stdout.splitlines()
    assert str(home / "patchloom/venv/bin/patchloom") in shown
    expected = {"MLFLOW_TRACKING_URI=http://MLFLOW_ADDRESS:5000", "AWS_DEFAULT_REGION=us-west-2"}
    assert expected | {"RAY_AUTH_MODE=token", "RAY_JOB_STOP_WAIT_TIME_S=300"} <= set(shown)
    assert (home / ".bashrc").read_text().count("env.sh") == 1
    version = as_ray_up("cd / && python -c 'import patchloom; print(patchloom.__file__)'", home).stdout
    assert version.startswith(str(home / "patchloom/venv/lib"))


def test_setup_refuses_an_old_python_and_a_missing_wheel(home: Path) -> None:
    old = home / "python3.10"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"\n')
    old.chmod(0o755)
    done = as_ray_up("bash ~/patchloom/node/setup.sh; exit $?", home, PYTHON=str(old))
    assert done.returncode == 1 and "3.11" in done.stderr
    (home / "patchloom/dist/patchloom-0.1.0-py3-none-any.whl").unlink()
    done = as_ray_up("bash ~/patchloom/node/setup.sh; exit $?", home)
    assert done.returncode == 2 and str(home / "patchloom/dist") in done.stderr
    assert not (home / "patchloom/venv").exists()


NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net"]


def needs_namespaces() -> None:
    if shutil.which("ip") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("needs root, unshare (util-linux) and ip (iproute2)")


@pytest.mark.slow
def test_nodes_join_with_the_token_only_and_leave_after_a_spot_notice(tmp_path: Path) -> None:
    needs_namespaces()
    shutil.copytree(NODE, tmp_path / "node")
    head = compose_service("head")["command"]
    worker = compose_service("worker")["command"].replace("${RAY_CPUS:-2}", "2")
    command = [*NAMESPACE, sys.executable, str(Path(__file__).parent / "own_cluster.py"), head, worker]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, str(tmp_path / "node")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "refused": 1,  # another token
        "nodes_after_refusal": 1,
        "cpus": {"10.77.0.1": 0, "10.77.0.2": 2},
        "drained_too_early": False,
        "left": ["10.77.0.1"],
        "script_ended": True,
    }, done.stderr[-3000:]


@pytest.mark.parametrize("command", ["{folder}/bin/patchloom train", "{folder}/bin/loop -m patchloom train"])
def test_head_stops_commands_of_patchloom_before_it_goes(command: str, tmp_path: Path) -> None:
    needs_namespaces()
    (tmp_path / "bin").mkdir()
    for name in ("patchloom", "loop"):
        program = tmp_path / "bin" / name
        program.write_text(
            f"#!/bin/bash\ntrap 'sleep 1; echo saved >> {tmp_path}/log; exit 143' TERM\nwhile :; do sleep .1; done\n"
        )
        program.chmod(0o755)
    script = tmp_path / "script.sh"
    started = command.format(folder=tmp_path)
    script.write_text(f"{started} & sleep 1; bash {NODE}/drain.sh head 30; echo drained >> {tmp_path}/log")
    subprocess.run([*NAMESPACE, "bash", str(script)], check=True, timeout=60)
    assert (tmp_path / "log").read_text().split() == ["saved", "drained"]


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """The address of a PostgreSQL server with the database of compose.yaml."""
    if not POSTGRES:
        pytest.skip("needs PostgreSQL (the Debian package postgresql)")
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    if as_user:
        for folder in (tmp_path, *tmp_path.parents[: len(tmp_path.parts) - 3]):
            folder.chmod(folder.stat().st_mode | 0o011)
        shutil.chown(data, "postgres")
    binaries, port = POSTGRES[-1].parent, free_port()
    subprocess.run(
        [*as_user, binaries / "initdb", "-D", data, "-U", "mlflow", "-A", "trust"], check=True, capture_output=True
    )
    server = subprocess.Popen(
        [*as_user, binaries / "postgres", "-D", data, "-p", str(port), "-c", f"unix_socket_directories={data}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
    while subprocess.run(ready).returncode:
        assert server.poll() is None
        time.sleep(0.1)
    subprocess.run([binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"], check=True)
    yield f"127.0.0.1:{port}"
    server.send_signal(signal.SIGINT)
    server.wait()


def status(url: str, host: str) -> int:
    """The status of an answer to a request that names a host."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.mark.slow
def test_compose_commands_make_the_bucket_and_an_mlflow_server_for_the_right_names(
    postgres: str, s3: str, tmp_path: Path
) -> None:
    import boto3
    import mlflow

    bucket = [sys.executable, *compose_service("bucket")["command"][1:]]
    for _ in range(2):  # `docker compose up` again
        subprocess.run(bucket, check=True, timeout=60)
    assert "patchloom" in {found["Name"] for found in boto3.client("s3").list_buckets()["Buckets"]}
    port = free_port()
    text = compose_service("mlflow")["command"].replace("${POSTGRES_PASSWORD:?set it in deploy/.env}", "secret")
    text = text.replace("postgres:5432", postgres).replace("5000", str(port))
    command = [str(Path(sys.executable).parent / "mlflow"), *text.split()[1:], "--workers", "1"]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://localhost:{port}"
    try:
        wait_until(lambda: status(f"{address}/health", "mlflow") == 200, server, timeout_s=120)
        page = f"{address}/api/2.0/mlflow/experiments/get?experiment_id=0"
        assert [status(page, host) for host in (f"mlflow:{port}", f"localhost:{port}", "other")] == [200, 200, 403]
        (tmp_path / "note.txt").write_text("kept")
        client = mlflow.MlflowClient(address)
        run = client.create_run("0").info.run_id
        client.log_artifact(run, str(tmp_path / "note.txt"))
        stored = boto3.client("s3").list_objects_v2(Bucket="patchloom", Prefix=f"mlflow/0/{run}/")["Contents"]
        assert [Path(found["Key"]).name for found in stored] == ["note.txt"]
    finally:
        server.terminate()
        server.wait(30)
