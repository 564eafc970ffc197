"""System load: processor, memory, disk, network and GPUs of the workers' nodes."""

import math

import torch

from patchloom.pipelines.train.hooks.hook import Hook
from patchloom.platform.compute.machine import LOAD_NAMES, system_load
from patchloom.platform.records.run import LineFields

MOST_NODES = 16  # whose load is in a progress line; Ray's own metrics contain that of all nodes


class SystemHook(Hook):
    """Adds the load since the last line: that of one node as `cpu_...`, of several as `node_0/cpu_...`."""

    def line_fields(self) -> LineFields:
        """The load of the nodes, on worker 0. All workers must call this together."""
        worker = self.run.worker
        rows = min(worker.count, MOST_NODES)
        loads = torch.zeros(rows, len(LOAD_NAMES) + 1, dtype=torch.float64, device=self.run.device)
        if worker.rank_on_node == 0 and worker.node < rows:
            load = system_load()
            own = [load.get(name, math.nan) for name in LOAD_NAMES]
            loads[worker.node] = torch.tensor([1.0, *own], dtype=torch.float64)  # the others add 0
        worker.reduce(loads)
        if worker.rank > 0:
            return {}
        nodes = {number: row[1:] for number, row in enumerate(loads.tolist()) if row[0]}
        return {
            "system": {
                f"node_{number}/{name}" if len(nodes) > 1 else name: value
                for number, values in nodes.items()
                for name, value in zip(LOAD_NAMES, values, strict=True)
                if not math.isnan(value)
            }
        }
