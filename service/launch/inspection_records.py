"""Records of checks that a checkpoint has passed, so that a later start need not repeat them.

A record holds for the same settings, the same files of the checkpoint, the same code and the same devices. Files are
compared by size and time of change, as ``make`` does. A replica checks the checkpoint again when it loads it, so a
record that is wrong delays a refusal and cannot prevent it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from service.cache import cache_directory
from service.checkpoints.demo import ADAPTER_FOLDER
from service.checkpoints.files import ADAPTER_CONFIG_FILE
from service.settings import ModelSettings

PACKAGES = ("torch", "transformers", "tokenizers")
"""The packages besides this one whose version may change what a check finds."""

DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd")
"""What exists where a GPU's driver is loaded."""

MAX_FILES = 1000
"""A folder with more files is checked at each start."""

MAX_RECORDS = 100
"""Older records are deleted."""

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class InspectionRecord:
    """What a check of one checkpoint found, or where that is to be recorded."""

    file: Path
    """The name is a digest of all that the answer depends on, but for the files of the demo model's merged folder."""

    answer: dict[str, Any] | None = None
    """The fields of the ``Inspection``; None: there is no record that holds."""

    def write(self, answer: dict[str, Any]) -> None:
        """Record what a check found; nothing is recorded where the cache cannot be written."""
        with contextlib.suppress(OSError):
            content = json.dumps({"answer": answer, "served_files": _states_of(Path(answer["path"]))})
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=".", dir=self.file.parent) as folder:
                unfinished = Path(folder) / self.file.name
                unfinished.write_text(content, encoding="utf-8")
                unfinished.replace(self.file)
            _delete_old(self.file.parent)


def record_of(question: str, settings: ModelSettings) -> InspectionRecord | None:
    """Return the record of a check; None where none is kept: for models of a hub, and for adapters.

    An adapter is served from a merged folder, and its base may change where this module does not look. The adapter of
    the demo model is the exception: its base is fixed.

    Args:
        question: all settings that the check depends on, as JSON.
        settings: name the checkpoint.
    """
    named = ADAPTER_FOLDER if settings.is_demo else Path(str(settings.path))
    try:
        if not settings.is_demo and (named / ADAPTER_CONFIG_FILE).is_file():
            return None
        files = _states_of(named) if named.is_dir() else None
        surroundings = [question, str(named.resolve()), files, _states_of(_PACKAGE, "*.py"), _versions(), _devices()]
        cache = cache_directory()
    except (OSError, PackageNotFoundError, RuntimeError, ValueError):
        # RuntimeError: this user has no home directory; ValueError: no file can have this name.
        return None
    if files is None:
        return None
    digest = hashlib.sha256(json.dumps(surroundings).encode()).hexdigest()
    file = cache / "inspections" / f"{digest[:32]}.json"
    return InspectionRecord(file, _read(file))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(file.read_bytes())
        answer: dict[str, Any] = record["answer"]
        served = _states_of(Path(answer["path"]))
        is_unchanged = served is not None and served == record["served_files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if is_unchanged else None


def _states_of(folder: Path, pattern: str = "*") -> list[list[Any]] | None:
    """Return path, size and time of change of each file of a folder; None where there are too many."""
    states: list[list[Any]] = []
    for file in _files_of(folder, pattern):
        state = file.stat()
        states.append([str(file), state.st_size, state.st_mtime_ns])
        if len(states) > MAX_FILES:
            return None
    return sorted(states)


def _files_of(folder: Path, pattern: str) -> Iterator[Path]:
    return (path for path in folder.rglob(pattern) if path.is_file())


def _versions() -> list[str]:
    return [version(package) for package in PACKAGES]


def _devices() -> list[Any]:
    return [*map(os.path.exists, DEVICE_FILES), os.environ.get("CUDA_VISIBLE_DEVICES")]


def _delete_old(folder: Path) -> None:
    records = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in records[MAX_RECORDS:]:
        file.unlink(missing_ok=True)
