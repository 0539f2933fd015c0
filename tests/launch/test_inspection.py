"""A checkpoint is checked in a process of its own, and once as long as nothing that the check depends on changes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_checkpoint

from service.cache import cache_directory
from service.errors import CheckpointError
from service.launch import inspection, inspection_records
from service.launch.inspection import Inspection, inspect_checkpoint
from service.settings import ModelSettings, TokenizationSettings

QUICK_CHILD = """
import json, sys
path = json.load(sys.stdin)["model"]["path"]
print(json.dumps({"path": path, "name": "tiny", "needs_gpu": False, "notes": ["A note."], "text_rule": "A rule."}))
"""
"""A check that accepts every folder, and does not import torch for it."""


class Checks:
    """Inspects checkpoints and counts the processes that are started for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        run = subprocess.run

        def counting(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return run(*arguments, **options)

        monkeypatch.setattr(subprocess, "run", counting)

    def run(self, path: Path | str, tokenization: TokenizationSettings | None = None, **settings: Any) -> Inspection:
        model = ModelSettings.model_validate({"path": str(path), **settings})
        return inspect_checkpoint(model, tokenization or TokenizationSettings())


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Checks:
    """Checks with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Checks(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the quick check accepts."""
    monkeypatch.setattr(inspection, "_CHILD", QUICK_CHILD)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that the real check reads."""
    return write_tiny_checkpoint(tmp_path / "checkpoint")


def test_a_check_that_has_passed_is_not_repeated(checks: Checks, checkpoint: Path) -> None:
    """The second start of the same model finds the same without a process for it."""
    first = checks.run(checkpoint)

    assert checks.run(checkpoint) == first
    assert first.path == str(checkpoint.resolve())
    assert first.text_rule
    assert checks.count == 1


def test_other_settings_are_checked(checks: Checks, folder: Path) -> None:
    """Settings of the model and of its text belong to what was checked."""
    checks.run(folder)
    checks.run(folder, TokenizationSettings(template="concat"))
    checks.run(folder, name="other")

    assert checks.count == 3


@pytest.mark.parametrize("change", ["touched", "added", "removed"])
def test_other_files_are_checked(checks: Checks, folder: Path, change: str) -> None:
    """A file of the checkpoint that was changed, added or removed is a reason for a new check."""
    extra = folder / "notes.txt"
    extra.write_text("before")
    checks.run(folder)

    if change == "touched":
        os.utime(extra, ns=(1, 1))
    elif change == "added":
        (folder / "more.txt").write_text("more")
    else:
        extra.unlink()
    checks.run(folder)

    assert checks.count == 2


@pytest.mark.parametrize("changed", ["_versions", "_devices"])
def test_another_environment_is_checked(
    checks: Checks, folder: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """Another version of a library, and a GPU that has come or gone, are reasons for a new check."""
    checks.run(folder)
    monkeypatch.setattr(inspection_records, changed, lambda: ["other"])
    checks.run(folder)

    assert checks.count == 2


def test_a_refusal_is_not_recorded(checks: Checks, checkpoint: Path) -> None:
    """A checkpoint that is refused is checked again, and accepted once it is whole."""
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    state = weights.stat()
    weights.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checks.run(checkpoint)
    weights.write_bytes(whole)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))

    assert checks.run(checkpoint).path == str(checkpoint.resolve())
    assert checks.count == 2


def test_an_adapter_is_checked_at_each_start(checks: Checks, folder: Path) -> None:
    """An adapter's base may change elsewhere, so its check is not recorded."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))

    assert checks.run(folder) == checks.run(folder)
    assert checks.count == 2


@pytest.mark.parametrize("content", [b"", b"[]", b'{"answer": {"path": "nowhere"}}'])
def test_a_damaged_record_is_replaced(checks: Checks, folder: Path, content: bytes) -> None:
    """A record that cannot be read leads to a check, which writes it anew."""
    first = checks.run(folder)
    (record,) = (cache_directory() / "inspections").glob("*.json")
    record.write_bytes(content)

    assert [checks.run(folder), checks.run(folder)] == [first, first]
    assert checks.count == 2


def test_a_cache_that_cannot_be_written_is_no_fault(checks: Checks, folder: Path, tmp_path: Path) -> None:
    """Without a place for records each start checks."""
    (tmp_path / "cache").write_text("a file where the folder would be")

    assert checks.run(folder) == checks.run(folder)
    assert checks.count == 2


def test_a_name_that_no_file_can_have_is_refused(checks: Checks) -> None:
    """The check itself refuses such a path, in a sentence."""
    with pytest.raises(CheckpointError):
        checks.run("no\0file")


def test_a_user_without_a_home_is_no_fault(checks: Checks, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even the place of the cache is known, each start checks."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", _raise_key_error)

    assert checks.run(folder) == checks.run(folder)
    assert checks.count == 2


def _raise_key_error(uid: int) -> None:
    raise KeyError(uid)


def test_old_records_are_deleted(checks: Checks, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache keeps the newest records only."""
    monkeypatch.setattr(inspection_records, "MAX_RECORDS", 2)
    for name in ("one", "two", "three"):
        checks.run(folder, name=name)
    checks.run(folder, name="three")
    checks.run(folder, name="one")

    assert len(list((cache_directory() / "inspections").glob("*.json"))) == 2
    assert checks.count == 4
