"""The fence of a remote folder: one command writes, the second is refused, and a dead one is replaced."""

import json
import re
import time
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy
from helpers import environment, run_python

from patchloom.errors import UserError
from patchloom.platform.files.fence import FENCE_FILE, fenced, holds_fence
from patchloom.platform.files.folder import Folder

HOLD_AND_DIE = """
import os, sys
from patchloom.platform.files.fence import fenced
from patchloom.platform.files.folder import Folder
with fenced(Folder.at(sys.argv[1] if len(sys.argv) > 1 else os.environ["FOLDER"])):
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHLOOM_FENCE_EXPIRES_S", "2")


def test_a_second_command_is_refused_while_the_first_lives(there: Folder) -> None:
    with fenced(there) as owner:
        card = json.loads(there.read(FENCE_FILE))
        assert card["owner"] == owner and holds_fence(there, owner) and not holds_fence(there, "another")
        began = time.monotonic()
        with pytest.raises(UserError, match=re.escape(card["host"])) as refused, fenced(there):
            pass
        assert str(card["pid"]) in str(refused.value) and "\n" not in str(refused.value)
        assert time.monotonic() - began < 2
    assert not there.files() and not holds_fence(there, owner)
    with fenced(there):
        pass


def test_a_killed_command_is_replaced_after_its_fence_expires(there: Folder) -> None:
    assert run_python(HOLD_AND_DIE, FOLDER=there.address).returncode == -9
    dead = json.loads(there.read(FENCE_FILE))["owner"]
    began = time.monotonic()
    with fenced(there) as owner:
        assert 1.9 < time.monotonic() - began < 15
        assert holds_fence(there, owner) and not holds_fence(there, dead)


def test_an_owner_whose_fence_was_taken_over_does_not_take_it_back(there: Folder) -> None:
    with fenced(there) as owner:
        other = json.loads(there.read(FENCE_FILE)) | {"owner": "another"}
        there.write_json(FENCE_FILE, other)
        time.sleep(0.6)
        assert not holds_fence(there, owner)
    assert json.loads(there.read(FENCE_FILE))["owner"] == "another"


def test_a_fence_survives_an_outage_of_the_store(s3: str, s3_environment: str, tmp_path: Path) -> None:
    with FaultyProxy(s3_environment) as proxy:
        there = Folder.at(f"{s3}/{tmp_path.name}/run?endpoint_override={proxy.address[7:]}&scheme=http")
        with fenced(there) as owner:
            proxy.set("503")
            time.sleep(0.6)
            proxy.set("ok")
            time.sleep(0.6)
            assert holds_fence(there, owner)
            assert json.loads(there.read(FENCE_FILE))["heartbeat"] > 0


def test_keys_and_endpoint_in_the_address_are_used(s3: str, s3_environment: str, tmp_path: Path) -> None:
    host = s3_environment.removeprefix("http://")
    address = f"s3://key:secret@{s3[5:]}/{tmp_path.name}?endpoint_override={host}&scheme=http&region=us-east-1"
    with (
        environment(AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_ACCESS_KEY_ID="wrong"),
        fenced(Folder.at(address)) as owner,
    ):
        assert holds_fence(Folder.at(address), owner)


def test_a_store_without_conditional_writes_is_reported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fenced(Folder.at(f"local://{here}")) as owner:
        assert owner == "" and holds_fence(Folder.at(f"local://{here}"), owner)
    assert f"local://{here} cannot be locked" in capsys.readouterr().out
