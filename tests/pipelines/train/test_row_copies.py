"""Rows reach a GPU through pinned memory and a stream of their own. The GPU is played by recorders of the calls."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from patchloom.models.step import StoredRows
from patchloom.pipelines.train.row_copies import CopyStream, copied

GPU = torch.device("cuda", 1)


class FakeTensor:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def pin_memory(self) -> "FakeTensor":
        self.calls.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> "FakeTensor":
        self.calls.append(("copied", device, non_blocking))
        return self

    def record_stream(self, stream: Any) -> None:
        self.calls.append(("used on", stream.name))


class FakeStream:
    def __init__(self, name: Any, calls: list[Any]) -> None:
        self.name, self.calls = name, calls

    def record_event(self) -> str:
        self.calls.append(("mark on", self.name))
        return "mark"

    def wait_event(self, event: str) -> None:
        self.calls.append((self.name, "waits for", event))


def test_rows_are_copied_from_pinned_memory_on_their_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def copying_on(stream: FakeStream) -> nullcontext[None]:
        calls.append(("copies on", stream.name))
        return nullcontext()

    monkeypatch.setattr(torch, "from_numpy", lambda _: FakeTensor(calls))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(f"copies of {device}", calls))
    monkeypatch.setattr(torch.cuda, "stream", copying_on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream(f"compute of {device}", calls))
    copies, image = CopyStream(GPU), np.zeros(3)
    with copies.copying():
        rows: Any = StoredRows(copied(image, GPU), copied(image, GPU))  # type: ignore[arg-type]
    mark = copies.copied_so_far()
    copies.use([rows], mark)
    assert calls == [
        ("copies on", "copies of cuda:1"),
        "pinned", ("copied", GPU, True), "pinned", ("copied", GPU, True),
        ("mark on", "copies of cuda:1"),
        ("compute of cuda:1", "waits for", "mark"),
        ("used on", "compute of cuda:1"), ("used on", "compute of cuda:1"),
    ]  # fmt: skip


def test_on_a_cpu_rows_keep_their_memory() -> None:
    values = np.arange(4.0)
    copies = CopyStream(torch.device("cpu"))
    with copies.copying():
        rows = StoredRows(copied(values, torch.device("cpu")), torch.zeros(1))
    assert copies.copied_so_far() is None
    copies.use([rows], None)
    assert rows.image.data_ptr() == values.__array_interface__["data"][0]
