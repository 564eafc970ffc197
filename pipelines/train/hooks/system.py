"""System load: processor, memory, disk, network and GPUs of worker 0's node."""

from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.platform.compute.machine import system_load
from patchloom.platform.records.run import LineFields


class SystemHook(Hook):
    """Adds the load since the last line."""

    def line_fields(self) -> LineFields:
        """The load of this node, on worker 0."""
        return {"system": system_load()} if self.run.worker.rank == 0 else {}
