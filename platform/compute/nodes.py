"""Nodes: ask every node of a cluster the same question."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from patchloom.platform.compute.session import begin_work

Question = TypeVar("Question")
Answer = TypeVar("Answer")

CLOCK_ROUNDS = 3


@dataclass(frozen=True)
class NodeResult(Generic[Answer]):
    """What one node answered.

    Args:
        name: its host name and address.
        answer: what the function returned; None if it failed.
        problem: why it failed, in one line.
        clock_offset_s: how far the clock of the node is ahead of that of this process, in seconds.
    """

    name: str
    answer: Answer | None
    problem: str | None
    clock_offset_s: float | None


class _NodeProcess:
    """A process on a node."""

    def __init__(self) -> None:
        begin_work()

    def now(self) -> float:
        return time.time()

    def ask(self, function: Callable[[Any], Any], question: Any) -> Any:
        return function(question)


def ask_nodes(
    function: Callable[[Question], Answer], question: Question, timeout_s: float = 120.0
) -> list[NodeResult[Answer]]:
    """Call a function once on every node of the session, at the same time.

    Args:
        function: a function of a module, which every node must have.
        question: its argument; pickled.
        timeout_s: how long to wait for all nodes.

    Returns:
        One result per node, sorted by name. A node that fails or does not answer has a problem instead of an answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = []
    for found in (found for found in ray.nodes() if found["Alive"]):
        where = NodeAffinitySchedulingStrategy(found["NodeID"], soft=False)
        process = ray.remote(_NodeProcess).options(num_cpus=0, scheduling_strategy=where).remote()
        name = f"{found['NodeManagerHostname']} ({found['NodeManagerAddress']})"
        asked.append((name, process, process.ask.remote(function, question)))
    ray.wait([answer for _, _, answer in asked], num_returns=len(asked), timeout=timeout_s)
    results = [_result(name, process, answer, timeout_s) for name, process, answer in asked]
    for _, process, _ in asked:
        ray.kill(process)
    return sorted(results, key=lambda result: result.name)


def _result(name: str, process: Any, answer: Any, timeout_s: float) -> NodeResult[Any]:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return NodeResult(name, ray.get(answer, timeout=0.1), None, _clock_offset(process))
    except GetTimeoutError:
        return NodeResult(name, None, f"no answer within {timeout_s:.0f} s", None)
    except (RayError, Exception) as error:  # of the function too: Ray raises it as its own class
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return NodeResult(name, None, lines[-1] if lines else type(error).__name__, None)


def _clock_offset(process: Any) -> float:
    """How far the clock of a process is ahead, in seconds; measured in the fastest of a few rounds."""
    import ray

    rounds: list[tuple[float, float]] = []
    for _ in range(CLOCK_ROUNDS):
        began = time.time()
        there = ray.get(process.now.remote(), timeout=10)
        took = time.time() - began
        rounds.append((took, there - began - took / 2))
    return min(rounds)[1]
