"""Rows of data files: JSON lines (plain or gzipped), Parquet, or a folder of them, as one stream of dictionaries.

This module reads files and lines; `service.data.prompts` defines what a row means. Rows are read one at a time, so
a data set may be larger than memory.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from service.errors import DatasetError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Endings of the files that are read from a folder."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its location, so that an error message can name the location instead of showing the text."""

    values: dict[str, Any] = field(repr=False)
    path: Path

    number: int
    """Counted from 1: the line of a JSON-lines file (empty lines included), or the row of a Parquet file."""

    @property
    def location(self) -> str:
        """File and number for error messages: ``pairs.jsonl.gz, row 17``."""
        return f"{self.path}, row {self.number}"


def dataset_files(path: Path) -> list[Path]:
    """Return the data files of a path: the file itself, or a folder's files in the order of their names.

    Subfolders are not searched.

    Raises:
        DatasetError: the path does not exist, the file has another ending, or the folder has no data file.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(SUFFIXES))
        if not files:
            raise DatasetError(f"{path} has no data file; the names of data files end in {', '.join(SUFFIXES)}.")
        return files
    if not path.exists():
        raise DatasetError(f"{path} does not exist.")
    if not path.name.endswith(SUFFIXES):
        raise DatasetError(f"{path} is not a data file; the names of data files end in {', '.join(SUFFIXES)}.")
    return [path]


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file, or of all data files of a folder, in file order.

    Raises:
        DatasetError: a file cannot be read, or a line is not one JSON object; names file and line, never the text.
            It is raised when that line is reached, after the rows before it were yielded.
    """
    for file in dataset_files(path):
        if file.suffix == ".parquet":
            yield from _read_parquet(file)
        else:
            yield from _read_json_lines(file)


def _read_json_lines(path: Path) -> Iterator[Row]:
    try:
        with _open_lines(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Row(_parse_object(line, path, number), path, number)
    except (OSError, EOFError, zlib.error) as error:
        # gzip reports a damaged file as any of these three.
        raise DatasetError(f"{path} cannot be read: {type(error).__name__}.") from error


def _open_lines(path: Path) -> gzip.GzipFile | BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _parse_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        # The decoder's exception contains the line, so it is not chained.
        raise DatasetError(f"{path}, line {number} is not JSON in UTF-8.") from None
    if not isinstance(values, dict):
        raise DatasetError(f"{path}, line {number} is not a JSON object, but a {type(values).__name__}.")
    return values


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, path, number)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read as Parquet: {type(error).__name__}.") from error
