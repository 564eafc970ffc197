"""Fixtures for tests of files: an empty remote folder, an empty local folder, and a separate cache."""

from pathlib import Path

import pytest

from patchloom.platform.files.folder import Folder


@pytest.fixture
def there(s3: str, tmp_path: Path) -> Folder:
    """An empty remote folder."""
    return Folder.at(f"{s3}/{tmp_path.name}/run")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """An empty local folder."""
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache for each test."""
    monkeypatch.setenv("PATCHLOOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
