"""Folders in the cache are built once, completely or not at all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from service.cache import build_once, cache_directory
from service.errors import CheckpointError


def fill(folder: Path) -> None:
    (folder / "weights").write_text("whole")


def fail_halfway(folder: Path) -> None:
    (folder / "weights").write_text("half")
    raise CheckpointError("the build failed")


def test_a_folder_is_built_once(tmp_path: Path) -> None:
    """The second call returns the folder and builds nothing."""
    folder = build_once(tmp_path / "cache" / "model", fill)

    assert build_once(folder, fail_halfway) == folder
    assert (folder / "weights").read_text() == "whole"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    """A failed build leaves neither an incomplete folder under the final name nor a temporary one."""
    with pytest.raises(CheckpointError):
        build_once(tmp_path / "model", fail_halfway)

    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once_agree(tmp_path: Path) -> None:
    """Both get the same complete folder; the result of the slower one is dropped."""
    both_started = threading.Barrier(2, timeout=10)
    found: list[Path] = []

    def fill_together(folder: Path) -> None:
        both_started.wait()
        fill(folder)

    def build() -> None:
        found.append(build_once(tmp_path / "model", fill_together))

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)

    assert found == [tmp_path / "model"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "whole"


def test_location_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache is under XDG_CACHE_HOME if that is set, else under ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "reward-service"

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert cache_directory() == tmp_path / ".cache" / "reward-service"
