"""The MLflow forwarder: a thread that sends the progress lines of a run to MLflow."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from patchloom.errors import UserError
from patchloom.platform.files.inside import inner_path
from patchloom.platform.progress import say
from patchloom.platform.records.run import PROGRESS_FILE, ProgressLine
from patchloom.platform.tracking.client import connect
from patchloom.platform.tracking.server_errors import first_line
from patchloom.platform.tracking.store import check_answers, shown_uri

READ_EVERY_S = 0.5
RETRY_AFTER_S = 10.0
CREATE_RUN_AFTER_S = 15.0  # of a run that has no line to send yet


# MLflow shows a section of charts for each part before a slash, in alphabetical order, then the names without a slash.
# So the losses are also sent in a group of their own, and the other groups have names that come after it.
LOSS_GROUP = {"loss": "loss/train", "held_out_loss": "loss/held_out"}
GROUPS = {
    "held_out_loss_by_sigma": "loss_by_sigma_held_out",
    "images_per_second_by_patch_size": "speed_by_patch_size",
}


def line_metrics(line: ProgressLine) -> dict[str, float]:
    """The numbers of a progress line by metric name; nested ones as `loss_by_patch_size/16`."""
    flat: dict[str, float] = {}
    for key, value in line.model_dump(exclude_unset=True, exclude={"step", "time_unix_s"}).items():
        if isinstance(value, dict):
            flat |= {f"{GROUPS.get(key, key)}/{inner}": float(number) for inner, number in value.items()}
        elif isinstance(value, (int, float)):
            flat |= {name: float(value) for name in (key, LOSS_GROUP.get(key)) if name is not None}
    return flat


class JsonLinesTail:
    """Reads the new lines of a growing `progress.jsonl`. If the file was replaced, it reads it from the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode, self._offset = 0, 0  # of the file that was read, and the bytes that were read

    def new_lines(self) -> list[ProgressLine]:
        """The complete lines since the last call, without damaged ones.

        A last line without its newline is still being written.
        """
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                content = file.read()
        except OSError:  # missing or not readable at the moment
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        found = []
        for line in complete.splitlines():
            with contextlib.suppress(UserError):  # commands that read the whole file name it
                found.append(ProgressLine.parse(line, self.path))
        return found


class MlflowForwarder:
    """Follows the `progress.jsonl` of a run during the block, shows each line, and sends it to MLflow.

    The file is the source of truth. If the store does not answer, training continues, the lines wait, and they are
    sent later. A line whose step is already in MLflow is not sent again.

    Args:
        folder: the run folder.
        find_run: returns the id of the MLflow run. It is called when there is a line to send, and called again if it
            raises.
        show: called with each line.
        creates_run: call `find_run` also before the first line, so that MLflow soon shows the run. This happens
            after some seconds, because importing the client is slow and would delay the first steps.
        watch_unsent: called with the number of lines that MLflow has not received, every half second.
    """

    def __init__(
        self,
        folder: Path,
        find_run: Callable[[], str],
        show: Callable[[ProgressLine], None],
        creates_run: bool = False,
        watch_unsent: Callable[[int], None] = lambda lines: None,
    ) -> None:
        self.folder, self.find_run, self.show, self.creates_run = folder, find_run, show, creates_run
        self.watch_unsent = watch_unsent
        self._create_run_at = time.monotonic() + CREATE_RUN_AFTER_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow-forwarder", daemon=True)
        self._tail = JsonLinesTail(folder / PROGRESS_FILE)
        self._unsent: list[ProgressLine] = []
        self._run_id = ""  # empty until the store has answered
        self._sent_step = -1
        self._retry_at, self._problem = 0.0, ""

    def __enter__(self) -> "MlflowForwarder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._retry_at = self._create_run_at = 0.0
        self._forward()
        if self._unsent:
            say(
                f"  MLflow at {shown_uri()} did not accept {len(self._unsent)} lines of "
                f"{self.folder / PROGRESS_FILE} ({self._problem}); --resume sends them"
            )

    def _follow(self) -> None:
        while not self._stop.wait(READ_EVERY_S):
            self._forward()
            self.watch_unsent(len(self._unsent))

    def _forward(self) -> None:
        """Show the new lines, and send all lines that wait, unless the store failed a moment ago."""
        for line in self._tail.new_lines():
            self.show(line)
            self._unsent.append(line)
        creates_run = self.creates_run and not self._run_id and time.monotonic() >= self._create_run_at
        if not (self._unsent or creates_run) or time.monotonic() < self._retry_at:
            return
        try:
            check_answers()  # the client itself would wait for a minute
            self._find_run()
            while self._unsent:
                self._send(self._unsent[0])
                self._unsent.pop(0)
        except Exception as error:  # training continues, whatever the client of a store raises
            if self.creates_run and not self._problem:  # it was reachable when the run started
                problem = first_line(error)
                say(f"  MLflow at {shown_uri()} failed ({problem}); training continues, lines are sent later")
            self._problem = f"{type(error).__name__}: {first_line(error)}"
            self._retry_at = time.monotonic() + RETRY_AFTER_S

    def _find_run(self) -> None:
        """Find the run and the last step that the store has of it, once."""
        if not self._run_id:
            client, run_id = connect(), self.find_run()
            history = client.get_metric_history(run_id, "images_seen")
            self._run_id, self._sent_step = run_id, max((point.step for point in history), default=-1)

    def _send(self, line: ProgressLine) -> None:
        from mlflow.entities import Metric

        client = connect()
        if line.step <= self._sent_step:
            return
        if line.preview is not None:
            self._send_preview(line.preview, line.step)
        stamp = int(line.time_unix_s * 1000)
        metrics = [Metric(key, value, stamp, line.step) for key, value in line_metrics(line).items()]
        client.log_batch(self._run_id, metrics=metrics)
        self._sent_step = line.step

    def _send_preview(self, preview: str, step: int) -> None:
        """Send the preview picture of a step, unless the store has it."""
        from PIL import Image

        client = connect()
        name = re.compile(rf"/preview[+%]step[+%]{step}[+%].*webp$")  # the small copy, which MLflow writes last
        if any(name.search(item.path) for item in client.list_artifacts(self._run_id, "images")):
            return
        place = self.folder / PROGRESS_FILE
        with Image.open(inner_path(self.folder, preview, place), formats=["PNG"]) as picture:
            client.log_image(self._run_id, picture.convert("RGB"), key="preview", step=step)
