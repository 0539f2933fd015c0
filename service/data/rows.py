"""Rows of data files: a file, a folder or a glob pattern of files, as one stream of dictionaries.

`service.data.decoders` reads the formats and `service.data.prompts` defines what a row means.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.data.decoders import SUFFIX_RULE, SUFFIXES, FileFacts, read_file
from service.data.files import DataFile, RemoteFile, file_system
from service.errors import DatasetError

_DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
"""Files that ``datasets`` writes beside the data; they have no rows."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and its location, so that an error message can name the location instead of showing the text."""

    values: dict[str, Any] = field(repr=False)
    path: DataFile

    number: int
    """Counted from 1: the line of a JSON-lines or CSV file (empty lines and the header included; of a row of several
    lines the first), or the row of any other file."""

    @property
    def location(self) -> str:
        """File and number for error messages: ``pairs.jsonl.gz, row 17``."""
        return f"{self.path}, row {self.number}"


def dataset_files(path: Path) -> list[Path]:
    """Return the data files of a path: the file itself, or those of a folder or a glob pattern in order of their names.

    Subfolders are not searched, except by ``**`` in a pattern. Hidden files (such as ``._train.jsonl``, which macOS
    writes beside ``train.jsonl``) and descriptions of data sets are skipped.

    Raises:
        DatasetError: the path does not exist, the file has another ending, or the folder or pattern has no data file.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if _is_data_file(file))
        if not files:
            raise DatasetError(f"{path} has no data file; {SUFFIX_RULE}.")
        return files
    if not path.exists():
        return _matching_files(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise DatasetError(f"{path} is not a data file; {SUFFIX_RULE}.")
    return [path]


def remote_files(url: str) -> list[RemoteFile]:
    """Return the data files of a URL of fsspec; the rules are those of `dataset_files`.

    Raises:
        DatasetError: as for `dataset_files`; or the storage cannot be read.
    """
    system, path = file_system(url)
    try:
        is_pattern = glob.has_magic(path)
        exists = is_pattern or system.exists(path)
        is_file = exists and not is_pattern and not system.isdir(path)
        found = [] if is_file else system.glob(path) if is_pattern else system.ls(path, detail=False) if exists else []
        files = [RemoteFile(str(system.unstrip_protocol(name))) for name in sorted(found) if system.isfile(name)]
    except Exception as error:  # each storage has exceptions of its own, whose texts may show credentials
        raise DatasetError(f"{url} cannot be read: {type(error).__name__}.") from error
    if not exists:
        raise DatasetError(f"{url} does not exist.")
    if is_file and not path.lower().endswith(SUFFIXES):
        raise DatasetError(f"{url} is not a data file; {SUFFIX_RULE}.")
    files = [RemoteFile(url)] if is_file else [file for file in files if _is_data_name(file.name)]
    if not files:
        raise DatasetError(f"{url} has no data file; {SUFFIX_RULE}.")
    return files


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a data file, or of all data files of a folder or a glob pattern, in file order.

    Raises:
        DatasetError: a file cannot be read, or a line is not a row; names file and line, never the text. It is raised
            when that line is reached, after the rows before it were yielded.
    """
    for file in dataset_files(path):
        yield from read_rows_of(file, FileFacts())


def read_rows_of(file: DataFile, facts: FileFacts) -> Iterator[Row]:
    """Yield the rows of one data file, and fill ``facts``.

    Raises:
        DatasetError: see `read_rows`.
    """
    return (Row(values, file, number) for number, values in read_file(file, facts))


def _is_data_file(file: Path) -> bool:
    return _is_data_name(file.name) and file.is_file()


def _is_data_name(name: str) -> bool:
    return not name.startswith(".") and name not in _DESCRIPTIONS and name.lower().endswith(SUFFIXES)


def _matching_files(pattern: Path) -> list[Path]:
    if not glob.has_magic(str(pattern)):
        raise DatasetError(f"{pattern} does not exist.")
    files = sorted(file for file in map(Path, glob.glob(str(pattern), recursive=True)) if _is_data_file(file))  # noqa: PTH207 - a pattern may be absolute
    if not files:
        raise DatasetError(f"No data file matches {pattern}; {SUFFIX_RULE}.")
    return files
