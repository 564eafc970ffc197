"""The progress log of a run, continued from its newest checkpoint."""

import time
from pathlib import Path

from patchloom.platform.records.run import LineFields, ProgressLine, read_progress, write_progress


class ProgressLog:
    """Writes `progress.jsonl`. Lines of steps after `step` are removed, because the steps are taken again."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        lines = [line for line in read_progress(folder) if line.step <= step]
        write_progress(folder, lines)
        self.last = lines[-1] if lines else None

    def write(self, fields: LineFields) -> None:
        """Append a line with these fields and the time."""
        self.last = ProgressLine.model_validate(fields | {"time_unix_s": time.time()})
        self.last.append_to(self.folder)
