"""The folder of an unfinished job beside its output: what it was started with, and which blocks are finished.

A block is finished when its part file is complete under its final name and a line in `BLOCKS_FILE` says so. The line is
written last, so a block whose writing was interrupted is scored again, and never twice in the output.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Self

from scoring.blocks import BlockKey
from scoring.encoding import BlockRecord, EncodedBlock
from scoring.parts import Format
from service.errors import JobError
from service.outputs import new_file, write_text

JOB_FILE = "job.json"
BLOCKS_FILE = "blocks.jsonl"
LOCK_FILE = "lock"
JOB_FORMAT = 1

FOLDER_MARKER = ".reward-score.json"
"""Marks a folder of part files as an output of this command; a folder without it is never replaced."""


def job_folder_of(out: Path) -> Path:
    """Return the folder of the unfinished job of an output."""
    return out.with_name(f".{out.name}.reward-score")


def check_job_folder(out: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Check that a job may start, before a model is loaded.

    Args:
        out: the output.
        settings: what the rewards and the columns depend on, as plain values by name.
        resume: continue an unfinished job, if there is one.
        overwrite: start again in place of one.

    Raises:
        JobError: there is an unfinished job and neither is set, or it was started with other settings.
    """
    folder = job_folder_of(out)
    if overwrite or not _has_finished_blocks(folder):
        return
    if not resume:
        raise JobError(
            f"{out} has an unfinished job: continue it with --resume, or start again with --overwrite ({folder})."
        )
    _check_equal(_read_settings(folder), settings, out)


def may_replace(out: Path) -> bool:
    """Return whether the unfinished job of an output was started with the order to replace an earlier output."""
    folder = job_folder_of(out)
    return (folder / JOB_FILE).exists() and bool(_read_job(folder).get("overwrite"))


class JobFolder:
    """The folder of one running job; a second process is refused. Used as a context manager.

    Args:
        out: the output.
        settings: see `check_job_folder`; the version of the model included.
        kind: of the part files.
        resume: see `check_job_folder`.
        overwrite: an earlier output may be replaced in the end; a job that is resumed does as it was told first.

    Raises:
        JobError: another process works on it, or it was started with other settings.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], kind: Format, *, resume: bool, overwrite: bool) -> None:
        self.path = job_folder_of(out)
        self._kind = kind
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.path / LOCK_FILE, out)
        try:
            self.finished = self._begin(out, settings, resume=resume, overwrite=overwrite)
            self.overwrite = may_replace(out)
            self._log = (self.path / BLOCKS_FILE).open("ab")
        except BaseException:
            self._lock.close()
            raise

    def _begin(
        self, out: Path, settings: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> dict[BlockKey, BlockRecord]:
        if resume and _has_finished_blocks(self.path):
            _check_equal(_read_settings(self.path), settings, out)
            return self._read_finished()
        for entry in self.path.iterdir():
            if entry.name != LOCK_FILE:
                entry.unlink()
        job = {"format": JOB_FORMAT, "overwrite": overwrite, "settings": settings}
        write_text(self.path / JOB_FILE, json.dumps(job, indent=1) + "\n")
        return {}

    def _read_finished(self) -> dict[BlockKey, BlockRecord]:
        """Read the finished blocks; a line that was cut by a crash is removed, and its block is not finished."""
        file = self.path / BLOCKS_FILE
        content = file.read_bytes() if file.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            file.write_bytes(whole)
        records = [BlockRecord.from_json(json.loads(line)) for line in whole.splitlines()]
        return {record.key: record for record in records if self._has_part(record)}

    def _has_part(self, record: BlockRecord) -> bool:
        part = self.part(record.key)
        return part.exists() and part.stat().st_size == record.num_bytes

    def part(self, key: BlockKey) -> Path:
        """Return the part file of a block; names are in the order of the input."""
        return self.path / f"part-{key[0]:05d}-{key[1]:06d}.{self._kind}"

    def add(self, encoded: EncodedBlock) -> None:
        """Store a finished block.

        Raises:
            OutputError: the disk is full, or cannot be written.
        """
        with new_file(self.part(encoded.record.key)) as unfinished, unfinished.open("wb") as file:
            file.write(encoded.content)
            file.flush()
            os.fsync(file.fileno())
        self._log.write(json.dumps(encoded.record.as_json()).encode() + b"\n")
        self._log.flush()
        os.fsync(self._log.fileno())
        self.finished[encoded.record.key] = encoded.record

    def description(self) -> str:
        """Return what the job was started with, as JSON."""
        return (self.path / JOB_FILE).read_text(encoding="utf-8")

    def remove(self) -> None:
        """Delete the folder, once the output is complete."""
        shutil.rmtree(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        if not self.finished and self.path.exists():  # nothing to resume
            self.remove()
        self._lock.close()


def _has_finished_blocks(folder: Path) -> bool:
    log = folder / BLOCKS_FILE
    return (folder / JOB_FILE).exists() and log.exists() and log.stat().st_size > 0


def _locked(file: Path, out: Path) -> IO[bytes]:
    lock = file.open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise JobError(f"Another process is scoring into {out}.") from None
    return lock


def _read_settings(folder: Path) -> dict[str, Any]:
    return dict(_read_job(folder)["settings"])


def _read_job(folder: Path) -> dict[str, Any]:
    try:
        job = json.loads((folder / JOB_FILE).read_bytes())
    except ValueError:
        job = {}
    if not isinstance(job, dict) or job.get("format") != JOB_FORMAT:
        raise JobError(f"{folder / JOB_FILE} was not written by this version: start again with --overwrite.")
    return job


def _check_equal(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Compare the settings that both have: before a model is loaded its version is not known."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        raise JobError(
            f"The unfinished job of {out} was started with {_described(changed, before)}, and now it is "
            f"{_described(changed, now)}: rows of both cannot be in one output. Use what it was started with, or start "
            "again with --overwrite."
        )


def _described(names: list[str], settings: Mapping[str, Any]) -> str:
    values = {name: settings[name] for name in names}
    return ", ".join(
        f"another {name}" if isinstance(value, list) else f"{name} {value}" for name, value in values.items()
    )
