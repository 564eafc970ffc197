"""The token of Ray's sessions is readable for its owner only."""

from pathlib import Path

import pytest

from patchloom.platform.compute.session import protect_token


def test_token_that_everyone_can_read_is_protected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    protect_token()
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("token")
    token.chmod(0o644)
    protect_token()
    assert token.stat().st_mode & 0o777 == 0o600 and token.read_text() == "token"
