"""The commands of `patchloom launch`: run a command as a job on a cluster, and list, follow and stop jobs."""

from dataclasses import asdict
from typing import Annotated, Any

import typer

from patchloom.pipelines.cli.help import CommandApp, GroupByJob
from patchloom.pipelines.cli.output import Printed

Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="http://HOST:8265 of the cluster's dashboard  [default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or port 8265 "
        "of this machine]",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job")]


class LaunchGroup(GroupByJob):
    """A group whose default command is `run`, so that `launch train ...` works."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert `run` before the words of another command, and take `--address URL` before each."""
        given = args[:2] if args[:1] == ["--address"] else args[: bool(args) and args[0].startswith("--address=")]
        rest = args[len(given) :]
        if rest and rest[0] in self.commands:
            args = [rest[0], *given, *rest[1:]]
        elif args and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


launch_app = CommandApp(
    cls=LaunchGroup,
    help="Run a command as a job on a Ray cluster.\n\n`patchloom launch [--address URL] COMMAND...` is short for "
    "`patchloom launch run`, whose help has all options. The other commands list, follow and stop jobs.",
    epilog="Example: patchloom launch --address http://head:8265 train my.yaml --data s3://b/data --out s3://b/run",
    no_args_is_help=True,
)


@launch_app.add(
    "patchloom launch --address http://head:8265 train my.yaml --data s3://b/data --out s3://b/run",
    "run",
    has_output_options=False,  # those after the command are for the command
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
)
def launch_run(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(help="A command of patchloom with its arguments")],
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job is submitted")] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Pass this variable of this shell to the job; no secrets. Can be repeated"),
    ] = None,
    env_file: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A file on every node with lines NAME=VALUE, such as a mounted secret"),
    ] = None,
    ship: Annotated[bool, typer.Option("--ship", help="Send this code even if the nodes have the same")] = False,
) -> None:
    """Run a command of patchloom as a job.

    `patchloom launch COMMAND...` is the short form. The exit code is that of the command. Ctrl-C leaves the job
    running; a training writes a checkpoint.
    """
    arguments = parsed_arguments(context, command)
    from patchloom.pipelines.launch.launching import LaunchOptions, launch

    raise SystemExit(launch(command, arguments, LaunchOptions(address, detach, env or [], env_file, ship)))


def parsed_arguments(context: Any, words: list[str]) -> dict[str, Any]:
    """The arguments of a command of patchloom by name. A wrong command line raises the error that it gives here."""
    parent = context.find_root()
    group, rest = parent.command, words
    while hasattr(group, "commands") and rest and group.name != "launch":
        name, group, rest = group.resolve_command(parent, rest)
        parent = group.context_class(group, info_name=name, parent=parent) if hasattr(group, "commands") else parent
    if hasattr(group, "commands"):
        context.fail(f"{' '.join(words)!r} is not a command that can be launched")
    with group.make_context(group.name, list(rest), parent=parent) as parsed:
        return dict(parsed.params)


@launch_app.add("patchloom launch status", "status")
def launch_status(
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Id of the job  [default: all jobs]")] = None,
    address: Address = None,
) -> Printed:
    """Show the state of a job, or of all."""
    from patchloom.pipelines.launch.launching import job_reports, job_table

    found = job_reports(job, address)
    return Printed([asdict(one) for one in found], job_table(found))


@launch_app.add("patchloom launch logs patchloom-train-1126-101500-1a2b --follow", "logs", has_output_options=False)
def launch_logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job is over")] = False,
    address: Address = None,
) -> None:
    """Print what a job printed.

    The exit code is that of the job, or 0 while it runs.
    """
    from patchloom.pipelines.launch.launching import job_logs

    raise SystemExit(job_logs(job, follow, address))


@launch_app.add("patchloom launch stop patchloom-train-1126-101500-1a2b", "stop")
def launch_stop(
    job: JobName,
    wait: Annotated[float, typer.Option(min=0, help="Wait this many seconds for its end")] = 600,
    address: Address = None,
) -> Printed:
    """Stop a job; a training writes a checkpoint first.

    The exit code is 1 if the job still runs after the wait.
    """
    from patchloom.pipelines.launch.launching import stop_job

    is_stopped = stop_job(job, wait, address)
    return Printed({"job": job, "stopped": is_stopped}, exit_code=0 if is_stopped else 1)
