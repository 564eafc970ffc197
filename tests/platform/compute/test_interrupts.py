"""Ctrl-C while a process trains without Ray: it ends the work, also where a library catches the exception."""

import contextlib
import signal
import time
from pathlib import Path

import pytest

from patchloom.pipelines.train.control import STOP_FILE, prepare_control
from patchloom.platform.compute.stopping import call_here
from patchloom.platform.files.folder import Folder


@pytest.mark.parametrize("is_caught", [True, False])
def test_ctrl_c_ends_the_work(tmp_path: Path, is_caught: bool) -> None:
    def work() -> str:
        with contextlib.suppress(KeyboardInterrupt) if is_caught else contextlib.nullcontext():
            signal.raise_signal(signal.SIGINT)
        while not (tmp_path / STOP_FILE).exists():  # as the training loop asks after each step
            time.sleep(0.01)
        return "stopped"

    with pytest.raises(KeyboardInterrupt):
        call_here(work, prepare_control(Folder.at(tmp_path)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_that_ignores_ctrl_c_goes_on_doing_so(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        def work() -> str:
            signal.raise_signal(signal.SIGINT)
            return "finished"

        assert call_here(work, prepare_control(Folder.at(tmp_path))) == "finished"
    finally:
        signal.signal(signal.SIGINT, before)
