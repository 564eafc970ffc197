"""Messages: what worker processes say reaches the terminal of the command that started them, each text once."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

from patchloom.platform.progress import is_heard, on_say, say

NAMESPACE = "patchloom-messages"
LISTENER = "command"
TAKE_EVERY_S = 1.0
SEND_TIMEOUT_S = 5.0  # a worker does not wait longer for a command that is gone

_is_showing = threading.Lock()  # one reader for nested sessions


class Mailbox:
    """The messages of the workers of one command. It runs as an actor next to the command."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def put(self, text: str) -> None:
        """Add a message."""
        self._texts.append(text)

    def take(self) -> list[str]:
        """Remove and return all messages."""
        texts, self._texts = self._texts, []
        return texts


@contextlib.contextmanager
def showing_messages() -> Iterator[None]:
    """Show the messages of this command's workers during the block. Needs a Ray session."""
    if is_in_worker() or not _is_showing.acquire(blocking=False):
        yield
        return
    try:
        with _reading():
            yield
    finally:
        _is_showing.release()


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(
        name=_name(), namespace=NAMESPACE, get_if_exists=True, scheduling_strategy=here
    )
    handle, shown, stop = mailbox.remote(), set[str](), threading.Event()

    def show() -> None:
        with contextlib.suppress(Exception):  # without messages the work goes on
            for text in ray.get(handle.take.remote(), timeout=SEND_TIMEOUT_S):
                if text not in shown:
                    shown.add(text)
                    say(text)

    def follow() -> None:
        while not stop.wait(TAKE_EVERY_S):
            show()

    thread = threading.Thread(target=follow, name="messages", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(SEND_TIMEOUT_S)
        show()
        with contextlib.suppress(Exception):
            ray.kill(handle)


def forward_messages(prefix: str | None = None) -> None:
    """Send what this process says from now on to the command, if this is a worker process of Ray.

    Args:
        prefix: precedes each text, such as the name of a trial. None keeps an earlier prefix.
    """
    if is_in_worker() and not (prefix is None and is_heard(LISTENER)):
        on_say(LISTENER, lambda text: _send(f"  {prefix}{text.strip()}" if prefix else text))


def connected_ray() -> Any:
    """The module of Ray if this process has a session of it; otherwise None, also while another thread imports it."""
    ray = sys.modules.get("ray")
    is_initialized = getattr(ray, "is_initialized", None)  # missing while Ray is imported
    return ray if is_initialized is not None and is_initialized() else None


def is_in_worker() -> bool:
    """Whether this process is an actor of Ray, which a command started."""
    ray = connected_ray()
    return ray is not None and ray.get_runtime_context().get_actor_id() is not None


def _send(text: str) -> None:
    import ray

    with contextlib.suppress(Exception):  # the text is in the worker's own log, too
        mailbox = ray.get_actor(_name(), NAMESPACE)
        ray.get(mailbox.put.remote(text), timeout=SEND_TIMEOUT_S)


def _name() -> str:
    import ray

    return str(ray.get_runtime_context().get_job_id())
