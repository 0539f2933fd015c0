"""Which files a job reads, in which order, and how they are divided into units that are read independently.

A unit is a run of files of at least `UNIT_BYTES` together, or the last ones. With Ray Data the units are read in
parallel. Units depend on names and sizes alone, so a job that is resumed divides its input in the same way.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scoring.blocks import read_input_rows
from service.data.files import DataFile, RemoteFile, file_system, is_url, open_file
from service.data.rows import dataset_files, remote_files
from service.errors import DatasetError

UNIT_BYTES = 64 * 1024 * 1024
NUM_CHECKED_ROWS = 100

_LINE_FORMATS = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")
_COUNTED_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class SizedFile:
    """A data file and its size in bytes, as stored."""

    file: DataFile
    num_bytes: int


def find_files(source: str) -> list[SizedFile]:
    """Return the data files of a file, folder, glob pattern or URL of fsspec, in order of their names.

    Raises:
        DatasetError: there is none, or one cannot be read.
    """
    files: Sequence[DataFile] = remote_files(source) if is_url(source) else dataset_files(Path(source))
    return [SizedFile(file, _size_of(file)) for file in files]


def divide(files: Sequence[SizedFile], unit_bytes: int = UNIT_BYTES) -> list[tuple[DataFile, ...]]:
    """Return the units of a job: consecutive files of at least ``unit_bytes`` together; the last may have less."""
    units: list[tuple[DataFile, ...]] = []
    unit: list[DataFile] = []
    num_bytes = 0
    for sized in files:
        unit.append(sized.file)
        num_bytes += sized.num_bytes
        if num_bytes >= unit_bytes:
            units.append(tuple(unit))
            unit, num_bytes = [], 0
    return [*units, tuple(unit)] if unit else units


def count_rows(files: Sequence[SizedFile]) -> int | None:
    """Return the rows of all files for a progress bar; None where counting would mean reading everything twice.

    Files of Parquet have their number of rows written in them; lines are counted in files of this machine that are not
    compressed.
    """
    counts = [_count(sized.file) for sized in files]
    return None if None in counts else sum(count or 0 for count in counts)


def _count(file: DataFile) -> int | None:
    name = file.name.lower()
    try:
        if name.endswith(_PARQUET):
            from pyarrow import parquet

            with open_file(file) as stored:
                return int(parquet.ParquetFile(stored).metadata.num_rows)
        if name.endswith(_LINE_FORMATS) and not isinstance(file, RemoteFile):
            with io.BufferedReader(file.open("rb", buffering=0), _COUNTED_BYTES) as stream:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(_COUNTED_BYTES), b""))
    except (OSError, ValueError):  # what is wrong with the file is told where it is read
        return None
    return None


def check_first_rows(files: Sequence[SizedFile]) -> None:
    """Check that some of the first rows can be scored, so that wrong data are refused before a model is loaded.

    Raises:
        DatasetError: there is no row, or none of the first `NUM_CHECKED_ROWS` can be scored.
    """
    rows = list(itertools.islice(read_input_rows(sized.file for sized in files), NUM_CHECKED_ROWS))
    if not rows:
        raise DatasetError(f"There is no row in {', '.join(str(sized.file) for sized in files[:3])}.")
    errors = [row.error.detail for row in rows if row.error is not None]
    if len(errors) == len(rows):
        raise DatasetError(f"None of the first {len(rows):,} rows can be scored. {errors[0]}")


def _size_of(file: DataFile) -> int:
    try:
        if isinstance(file, RemoteFile):
            system, path = file_system(file.url)
            return int(system.size(path) or 0)
        return file.stat().st_size
    except Exception as error:  # each storage has exceptions of its own, whose texts may show credentials
        raise DatasetError(f"{file} cannot be read: {type(error).__name__}.") from error
