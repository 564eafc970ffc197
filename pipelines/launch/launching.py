"""Launching: runs commands as jobs on a Ray cluster, and lists, follows and stops these jobs."""

import json
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import requires
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement

import patchloom
from patchloom.errors import UserError
from patchloom.pipelines.launch import node
from patchloom.pipelines.launch.following import exit_code_of, show_logs
from patchloom.pipelines.launch.packing import absolute_paths, pack_code, pack_command
from patchloom.pipelines.launch.settings import LOOPBACK, travelling_settings
from patchloom.platform.compute.job_server import JobOrder, JobReport, JobServer, JobState
from patchloom.platform.progress import aligned, clock, say
from patchloom.redaction import redacted

STOP_WAIT_S = 600  # Ray kills a job that has not ended so long after SIGTERM; its own default is 3
PROBE_WAIT_S = 120.0
NEED_MLFLOW = ("train", "tune", "autoencoder", "models", "demo")
CHECKPOINTED = ("train", "autoencoder")  # commands whose run can be asked for a checkpoint
JOB_HEADER = ("JOB", "STATE", "STARTED", "DURATION", "COMMAND")
DETACHED = 130  # the exit code after Ctrl-C


@dataclass(frozen=True)
class LaunchOptions:
    """Where and how a command runs.

    Args:
        address: http://HOST:PORT of the cluster's dashboard; by default as for `ray job submit`.
        detach: return when the job is submitted.
        env: names of variables of this shell that the job gets.
        env_file: a file on every node with lines NAME=VALUE, which the processes of the job read: for secrets.
        ship: send the code of this installation even if the nodes have the same.
    """

    address: str | None = None
    detach: bool = False
    env: list[str] = field(default_factory=list)
    env_file: str | None = None
    ship: bool = False


def launch(words: list[str], arguments: dict[str, Any], options: LaunchOptions) -> int:
    """Run a command of Patchloom as a job on a cluster.

    Args:
        words: the command and its arguments, such as `train recipe.yaml --data s3://bucket/data --out s3://bucket/run`.
        arguments: the values of its arguments and options by name.
        options: where and how it runs.

    Returns:
        The exit code of the command; 143 if the job was stopped, 130 after Ctrl-C, 0 with `detach`.

    Raises:
        UserError: the cluster does not answer or lacks what Patchloom needs, or data is on this machine.
    """
    for word in words:
        if redacted(word) != word:
            raise UserError(
                f"{redacted(word)}: the command has a password or key, which Ray's dashboard would show: set it on the "
                "nodes, or write it to a file there and name the file with --env-file"
            )
    with _temporary_folder() as folder:
        packed = pack_command(words, arguments, folder)
        server = JobServer(options.address)
        settings = travelling_settings(options.env, urlsplit(server.address).hostname in LOOPBACK)
        found = ask_node(server, absolute_paths(arguments))
        _check_node(found, words[0], settings, options)
        if options.ship or found.digest != own_digest():
            pack_code(folder)
            say(f"  sending the code of patchloom {patchloom.__version__} to {server.address}")
        settings |= {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
        settings |= {"PATCHLOOM_ENV_FILE": options.env_file} if options.env_file else {}
        order = JobOrder(
            f"exec python -m patchloom {shlex.join(packed)}",
            folder,
            settings,
            {"patchloom": words[0]},
            _new_name(words),
        )
        job = server.submit(order)
        say(f"  job {job} at {server.address}")
        if options.detach:
            say(f"  follow it: patchloom launch logs {job} --follow; stop it: patchloom launch stop {job}")
            return 0
        return _follow(server, job, order, arguments)


def _follow(server: JobServer, job: str, order: JobOrder, arguments: dict[str, Any]) -> int:
    try:
        show_logs(server.follow(job))
    except KeyboardInterrupt:
        asked = _ask_for_checkpoint(server, order, str(arguments.get("out") or ""))
        say(
            f"  the job goes on{asked}. Follow it: patchloom launch logs {job} --follow; stop it: "
            f"patchloom launch stop {job}"
        )
        return DETACHED
    return _end(server, job)


def _end(server: JobServer, job: str) -> int:
    """Print how a job ended, unless its command did; returns its exit code."""
    report = server.wait(job, PROBE_WAIT_S)
    if report.state == JobState.FAILED and report.exit_code is None:
        say(f"  job {job} was lost: {report.message.strip().splitlines()[0] if report.message else 'no message'}")
    elif report.exit_code == 127:
        say("  the nodes have no `python`: put it on the PATH of `ray start`")
    return exit_code_of(report)


def _ask_for_checkpoint(server: JobServer, order: JobOrder, out: str) -> str:
    """Ask the run of a job for a checkpoint, by a small job, as only the cluster can write there."""
    if order.labels["patchloom"] not in CHECKPOINTED or not out:
        return ""
    call = f"from patchloom.pipelines.train.control import ask_for_checkpoint; ask_for_checkpoint({out!r})"
    server.submit(
        JobOrder(f"exec python -c {shlex.quote(call)}", order.folder, order.environment, {"asks": "checkpoint"})
    )
    return " and writes a checkpoint soon"


@dataclass(frozen=True)
class NodeAnswer:
    """What the head node of a cluster has installed.

    Args:
        digest: of the code of Patchloom; None without it.
        versions: of the packages that Patchloom requires, by name; None for those that are missing.
        python: version of Python.
        host: its host name.
        missing: paths of this machine that it does not have.
        tracking_uri: whether the node sets MLFLOW_TRACKING_URI.
    """

    digest: str | None
    versions: dict[str, str | None]
    python: str
    host: str
    missing: list[str]
    tracking_uri: bool


def own_digest() -> str:
    """The digest of the running code."""
    return node.code_digest(Path(patchloom.__file__).parent)


def ask_node(server: JobServer, paths: list[str]) -> NodeAnswer:
    """Ask the node that runs the commands of jobs what it has, by a job of seconds.

    Args:
        server: of the cluster.
        paths: absolute paths that exist on this machine.
    """
    asked = json.dumps({"packages": [need.name for need in _requirements()], "paths": paths})
    with _temporary_folder() as folder:
        shutil.copyfile(node.__file__, folder / "node.py")
        job = server.submit(JobOrder(shlex.join(["python", "node.py", asked]), folder, labels={"asks": "versions"}))
    report = server.wait(job, PROBE_WAIT_S)
    if not report.state.is_over:
        raise UserError(
            f"{server.address}: a first small job did not end within {clock(PROBE_WAIT_S)}, so the cluster is busy or "
            f"broken: see `patchloom launch status {job}`"
        )
    for line in server.logs(job).splitlines():
        if line.startswith(node.MARK):
            return NodeAnswer(**json.loads(line.removeprefix(node.MARK)))
    problem = (server.logs(job).strip().splitlines() or [report.message])[-1]
    raise UserError(
        f"{server.address}: `python` does not work on the nodes ({problem}): put it on the PATH of `ray start`"
    )


def _requirements() -> list[Requirement]:
    """What Patchloom requires without extras, from its installation."""
    found = [Requirement(text) for text in requires("patchloom") or []]
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def _check_node(found: NodeAnswer, command: str, settings: dict[str, str], options: LaunchOptions) -> None:
    """Raise UserError if a node lacks what a command needs."""
    if found.missing:
        raise UserError(
            f"{found.missing[0]} exists on this machine and not on the node {found.host}, and data does not travel: "
            "give an address such as s3://bucket/folder, or a path on a file system that every node mounts"
        )
    lacks = [
        f"{need.name}{need.specifier} (has {found.versions.get(need.name) or 'none'})"
        for need in _requirements()
        if not need.specifier.contains(found.versions.get(need.name) or "0", prereleases=True)
        or not found.versions.get(need.name)
    ]
    if lacks:
        raise UserError(
            f"the nodes (Python {found.python}) lack {', '.join(lacks)}: install patchloom's requirements in their "
            "image; launch sends only its code"
        )
    if (
        command in NEED_MLFLOW
        and "MLFLOW_TRACKING_URI" not in settings
        and not found.tracking_uri
        and not options.env_file
    ):
        raise UserError(
            "MLFLOW_TRACKING_URI is not an address of a server, here or on the nodes: start `mlflow server` where the "
            "nodes reach it and set the variable; a file would be lost with the job"
        )


def job_reports(job: str | None = None, address: str | None = None) -> list[JobReport]:
    """One job of a cluster, or all jobs of Patchloom."""
    server = JobServer(address)
    return [server.report(job)] if job else [found for found in server.reports() if "patchloom" in found.labels]


def job_table(jobs: list[JobReport]) -> str:
    """Jobs as a table: id, state, start, duration and command."""
    return aligned([JOB_HEADER, *map(_row, jobs)]) if jobs else "no job"


def _row(job: JobReport) -> tuple[str, ...]:
    started = time.strftime("%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""
    duration = clock((job.ended or time.time()) - job.started) if job.started else ""
    state = job.state.lower() + (f", exit code {job.exit_code}" if job.exit_code else "")
    return job.name, state, started, duration, job.entrypoint.removeprefix("exec python -m ")


def job_logs(job: str, follow: bool, address: str | None = None) -> int:
    """Print what a job printed; with `follow`, until it is over. Returns its exit code, 0 while it runs."""
    server = JobServer(address)
    report = server.report(job)
    if not follow:
        show_logs([server.logs(job)])
        return exit_code_of(report) if report.state.is_over else 0
    try:
        show_logs(server.follow(job))
    except KeyboardInterrupt:
        say(f"  the job goes on. Stop it: patchloom launch stop {job}")
        return DETACHED
    return _end(server, job)


def stop_job(job: str, wait_s: float, address: str | None = None) -> bool:
    """Stop a job: its command gets SIGTERM, so that a training writes a checkpoint.

    Args:
        job: its id.
        wait_s: how long to wait for its end, in seconds. Ray kills it 10 minutes after SIGTERM.
        address: of the job server.

    Returns:
        Whether the job is over.
    """
    server = JobServer(address)
    if server.report(job).state.is_over or not server.stop(job):
        say(f"{job} is over already")
        return True
    say(f"  asked {job} to stop; a training writes a checkpoint first ...")
    report = server.wait(job, wait_s)
    if report.state.is_over:
        say(f"{job} is stopped")
    else:
        say(f"{job} still runs: ask for it with `patchloom launch status {job}`")
    return report.state.is_over


def _new_name(words: list[str]) -> str:
    return f"patchloom-{words[0]}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="patchloom-launch-") as name:
        yield Path(name)
