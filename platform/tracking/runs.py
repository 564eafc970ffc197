"""Runs in MLflow: create and end them, and record parameters, metrics, files and datasets."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from patchloom.platform.records.record import flat_values
from patchloom.platform.tracking.client import connect, experiment_id
from patchloom.platform.tracking.origin import origin_tags
from patchloom.redaction import redacted, redacted_values

RUNNING, FINISHED = "RUNNING", "FINISHED"
PARAM_CHARACTERS = 500  # MLflow's limit for the value of a parameter


@dataclass(frozen=True)
class LoggedDataset:
    """A dataset as MLflow knows it."""

    name: str
    digest: str


def begin_run(
    name: str,
    kind: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    parent: str | None = None,
    description: str = "",
) -> str:
    """Create a run, with tags for its user, its command and the commit of the code.

    Args:
        name: its name on MLflow's pages.
        kind: what the run is, for the tag `patchloom.kind`.
        params: values by name, recorded as text; nested ones by dotted names such as `patches.p`.
        tags: further tags.
        parent: id of the run that this one belongs to.
        description: what the run does, as Markdown.

    Returns:
        The id of the run.
    """
    client = connect()
    all_tags = {"mlflow.runName": name, "patchloom.kind": kind, **origin_tags(kind), **tags}
    if description:
        all_tags["mlflow.note.content"] = description
    if parent:
        all_tags["mlflow.parentRunId"] = parent
    run_id = str(client.create_run(experiment_id(client), tags=redacted_values(all_tags)).info.run_id)
    from mlflow.entities import Param

    values = {key: redacted(str(value))[:PARAM_CHARACTERS] for key, value in flat_values(params).items()}
    with failed_on_error(run_id):
        client.log_batch(run_id, params=[Param(key, value) for key, value in values.items()])
    return run_id


@contextlib.contextmanager
def failed_on_error(run_id: str) -> Iterator[None]:
    """End a run as FAILED if the block raises, so that a run which never began is not shown as running."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            end_run(run_id, "FAILED")
        raise


def run_status(run_id: str) -> str:
    """The status of a run: RUNNING, FINISHED, FAILED or KILLED."""
    return str(connect().get_run(run_id).info.status)


def end_run(run_id: str, status: str = FINISHED) -> None:
    """End a run as FINISHED, FAILED or KILLED. A run with this status already keeps its end time."""
    if run_status(run_id) != status:
        connect().set_terminated(run_id, status)


def reopen_run(run_id: str, is_made_longer: bool = False) -> None:
    """Show a run that goes on as running again. One that finished stays as it is, unless it is made longer."""
    if run_status(run_id) not in (RUNNING, *(() if is_made_longer else (FINISHED,))):
        connect().update_run(run_id, RUNNING)


def run_exists(run_id: str) -> bool:
    """Whether the store has this run and can write to it; raises MlflowException if the store does not answer."""
    from mlflow.exceptions import MlflowException

    try:
        run = connect().get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return bool(run.info.lifecycle_stage == "active")  # the runs of a deleted experiment are deleted


def recorded_value(run_id: str, key: str) -> str | None:
    """The value of a tag of a run, or else of its parameter of this name; None if it has neither."""
    data = connect().get_run(run_id).data
    value: str | None = data.tags.get(key, data.params.get(key))
    return value


def tags_of_run(run_id: str) -> dict[str, str]:
    """The tags of a run."""
    return dict(connect().get_run(run_id).data.tags)


def tag_run(run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run."""
    client = connect()
    for key, value in tags.items():
        client.set_tag(run_id, key, redacted(value))


def log_artifacts(run_id: str, *files: Path, under: str | None = None) -> None:
    """Store files and folders as artifacts of a run, in the artifact folder `under`."""
    client = connect()
    for file in files:
        if file.is_dir():
            client.log_artifacts(run_id, str(file), f"{under}/{file.name}" if under else file.name)
        else:
            client.log_artifact(run_id, str(file), under)


def log_metrics(
    run_id: str,
    metrics: Mapping[str, float],
    step: int = 0,
    *,
    model_id: str | None = None,
    dataset: LoggedDataset | None = None,
    time_unix_s: float | None = None,
) -> None:
    """Record metrics of a step.

    Args:
        run_id: the run.
        metrics: values by name.
        step: the step that they belong to.
        model_id: a logged model, with which MLflow also shows them.
        dataset: what the model was measured on; MLflow shows it with the logged model.
        time_unix_s: when they were measured; now by default.
    """
    from mlflow.entities import Metric

    stamp = int((time.time() if time_unix_s is None else time_unix_s) * 1000)
    # one request with a model and a dataset is for one model and one dataset
    of = {"model_id": model_id, **({"dataset_name": dataset.name, "dataset_digest": dataset.digest} if dataset else {})}
    points = [Metric(key, float(value), stamp, step, **of) for key, value in metrics.items()]
    connect().log_batch(run_id, metrics=points)


def log_dataset(run_id: str, address: str, fingerprint: str, context: str = "training") -> LoggedDataset:
    """Record which dataset a run uses, and what for: `training` or `evaluation`."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    address = redacted(address)
    source = json.dumps({"uri": address if "://" in address else Path(address).absolute().as_uri()})
    name = address.rstrip("/").rsplit("/", 1)[-1]
    entity = Dataset(name=name, digest=fingerprint[:32], source_type="local", source=source)
    connect().log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])
    return LoggedDataset(name, fingerprint[:32])
