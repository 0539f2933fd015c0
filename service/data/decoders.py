"""File formats of rows: JSON lines, JSON, CSV, Parquet and Arrow, plain or compressed, as one stream of dictionaries.

This module knows bytes and formats, not what a row means. Rows of JSON lines, CSV, Parquet and Arrow are read one at a
time, so a data set may be larger than memory; a JSON array is read whole. Errors name file and line, never the text.
A line that is no row is an error of its own: a reader that goes on after it gets the rows behind it.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, TypeAlias, cast

from service.data.files import DataFile, open_file, open_memory_map
from service.errors import DatasetError

TEXT_KEYS = ("prompt", "chosen", "rejected", "completion", "response", "messages")
"""The keys of a row that have texts or conversations."""

NumberedRow: TypeAlias = tuple[int, dict[str, Any]]
"""A row and its number, see `service.data.rows.Row.number`."""

NumberedEntry: TypeAlias = tuple[int, dict[str, Any] | DatasetError]
"""As `NumberedRow`; or the number of a line that is no row, and what is wrong with it."""

_UTF8_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_ROW_LISTS = ("data", "rows")
"""Keys under which a JSON object may have its list of rows."""

_DELIMITERS = (",", ";", "\t")
_MAX_CSV_FIELD = 2**31 - 1
"""Characters; the csv module's own limit of 131,072 is shorter than many conversations."""


@dataclass(slots=True)
class FileFacts:
    """Properties of a file that do not change its rows; filled while it is read."""

    has_byte_order_mark: bool = False

    has_crlf: bool = False
    """Whether lines end in carriage return and line feed."""

    num_blank_lines: int = 0


def read_file(path: DataFile, facts: FileFacts) -> Iterator[NumberedRow]:
    """Yield the rows of a data file with their numbers; the name's ending decides how it is read.

    Numbers that are not numbers (NaN, as pandas writes a missing value) become None.

    Raises:
        DatasetError: the file cannot be read, or a line is not a row. It is raised when that line is reached.
    """
    for number, values in read_entries(path, facts):
        if isinstance(values, DatasetError):
            raise values
        yield number, values


def read_entries(path: DataFile, facts: FileFacts) -> Iterator[NumberedEntry]:
    """Yield the rows of a data file as `read_file` does, and an error in the position of each line that is no row.

    Raises:
        DatasetError: the file cannot be read from here on.
    """
    for number, values in _decode(path, facts):
        if isinstance(values, DatasetError):
            yield number, values
        else:
            yield number, {name: None if _is_nan(value) else value for name, value in values.items()}


def _decode(path: DataFile, facts: FileFacts) -> Iterator[NumberedEntry]:
    name = path.name.lower()
    if name.endswith((".parquet", ".pq")):
        yield from _read_parquet(path)
    elif name.endswith(".arrow"):
        yield from _read_arrow(path)
    else:
        try:
            with _open(path) as stream:
                _skip_mark(stream, path, facts)
                yield from _TEXT_FORMATS[_suffixes(name)[0]](stream, path, facts)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            # Each library reports a damaged file in its own way; gzip as any of the first three.
            raise DatasetError(f"{path} cannot be read: {type(error).__name__}.") from error


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


# --- Bytes -----------------------------------------------------------------------------------------------------------


@contextmanager
def _open(path: DataFile) -> Iterator[Any]:
    compression = _suffixes(path.name.lower())[1]
    with (
        open_file(path) as stored,
        io.BufferedReader(cast("io.RawIOBase", _COMPRESSIONS[compression](stored))) as stream,
    ):
        yield stream


def _open_zstandard(stored: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(stored, mode="r"), "zstd")


_COMPRESSIONS: Mapping[str, Callable[[IO[bytes]], Any]] = {
    "": lambda stored: stored,
    ".gz": lambda stored: gzip.GzipFile(fileobj=stored),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstandard,
}


def _suffixes(name: str) -> tuple[str, str]:
    """Return the endings of format and compression of a data file's name: ``(".jsonl", ".gz")``."""
    return next((text, packed) for text in _TEXT_FORMATS for packed in _COMPRESSIONS if name.endswith(text + packed))


def _skip_mark(stream: io.BufferedReader, path: DataFile, facts: FileFacts) -> None:
    start = stream.peek(len(_UTF8_MARK))
    if start.startswith(_UTF16_MARKS):
        raise DatasetError(f"{path} is in UTF-16: save it in UTF-8.")
    if start.startswith(_UTF8_MARK):
        facts.has_byte_order_mark = True
        stream.read(len(_UTF8_MARK))


# --- JSON ------------------------------------------------------------------------------------------------------------


def _read_json_lines(stream: IO[bytes], path: DataFile, facts: FileFacts) -> Iterator[NumberedEntry]:
    for number, line in enumerate(stream, start=1):
        facts.has_crlf |= line.endswith(b"\r\n")
        if line.strip():
            yield number, _parse_object(line, path, number)
        else:
            facts.num_blank_lines += 1


def _parse_object(line: bytes, path: DataFile, number: int) -> dict[str, Any] | DatasetError:
    values = _parse_json(line)
    if values is None:
        hint = " If the file is one JSON array, its name must end in .json." if line.lstrip().startswith(b"[") else ""
        return DatasetError(f"{path}, line {number} is not JSON in UTF-8.{hint}")
    if not isinstance(values, dict):
        return DatasetError(f"{path}, line {number} is not a JSON object, but a {type(values).__name__}.")
    return values


def _parse_json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None  # the decoder's exception contains the text, so it is not chained


def _read_json(stream: IO[bytes], path: DataFile, facts: FileFacts) -> Iterator[NumberedEntry]:
    """Read an array of objects, an object with a list of them, or JSON lines, which some tools write as ``.json``."""
    content = stream.read()
    if content.lstrip().startswith(b"["):
        rows = _parse_json(content)
        if rows is None:
            raise DatasetError(f"{path} is not JSON in UTF-8.")
    elif isinstance(parsed := _parse_json(content), dict) and not _is_row(parsed):
        rows = _listed_rows(parsed, path)
    else:
        yield from _read_json_lines(io.BytesIO(content), path, facts) if parsed is None else [(1, parsed)]
        return
    facts.has_crlf = b"\r\n" in content  # a line break inside a JSON string is escaped
    for number, values in enumerate(rows, start=1):
        if isinstance(values, dict):
            yield number, values
        else:
            yield number, DatasetError(f"{path}, row {number} is not a JSON object, but a {type(values).__name__}.")


def _is_row(parsed: Mapping[str, Any]) -> bool:
    return any(isinstance(parsed.get(key), str | list) for key in TEXT_KEYS)


def _listed_rows(parsed: Mapping[str, Any], path: DataFile) -> list[Any]:
    lists = [parsed[key] for key in _ROW_LISTS if isinstance(parsed.get(key), list)]
    if len(lists) != 1:
        raise DatasetError(
            f'{path} is one JSON object; its rows must be a list, in the file itself or under either "data" or "rows".'
        )
    return list(lists[0])


# --- CSV -------------------------------------------------------------------------------------------------------------


def _read_csv(stream: IO[bytes], path: DataFile, facts: FileFacts) -> Iterator[NumberedEntry]:
    """Read rows after a header; an empty field is a missing value. A row's number is that of its first line."""
    csv.field_size_limit(_MAX_CSV_FIELD)
    end = 0
    try:
        with io.TextIOWrapper(cast("io.BufferedReader", stream), encoding="utf-8", newline="") as text:
            first = text.readline()
            delimiter = max(_DELIMITERS, key=first.count)
            records = csv.reader(_lines(first, text, facts), delimiter=delimiter, strict=True)
            header: list[str] | None = None
            for record in records:
                number, end = end + 1, records.line_num
                if not record:
                    facts.num_blank_lines += 1
                elif header is None:
                    header = _check_header(record, path)
                else:
                    yield number, _named_fields(header, record, path, number)
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is not in UTF-8.") from None
    except csv.Error:
        raise DatasetError(f"{path}: the row at line {end + 1} is not CSV.") from None


def _lines(first: str, rest: io.TextIOWrapper, facts: FileFacts) -> Iterator[str]:
    facts.has_crlf = first.endswith("\r\n")
    if first:
        yield first
    yield from rest


def _check_header(record: list[str], path: DataFile) -> list[str]:
    names = [name.strip() for name in record]
    if len(set(names)) < len(names):
        raise DatasetError(f"{path} has two columns of the same name.")
    if not set(names) & set(TEXT_KEYS):
        raise DatasetError(f"{path} must begin with a header that names its columns, such as prompt,chosen,rejected.")
    return names


def _named_fields(header: list[str], record: list[str], path: DataFile, number: int) -> dict[str, Any] | DatasetError:
    if len(record) != len(header):
        return DatasetError(f"{path}, row {number} has {len(record)} fields; the header has {len(header)}.")
    return {name: value or None for name, value in zip(header, record, strict=True)}


# --- Columns ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: DataFile) -> Iterator[NumberedRow]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with open_file(path) as stored, parquet.ParquetFile(stored) as file:
            yield from _number(file.iter_batches())
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read as Parquet: {type(error).__name__}.") from error


def _read_arrow(path: DataFile) -> Iterator[NumberedRow]:
    """Read the stream format, which ``datasets`` writes, or the file format."""
    import pyarrow as pa

    try:
        with open_memory_map(path) as source:
            try:
                batches = iter(pa.ipc.open_stream(source))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield from _number(batches)
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read as Arrow: {type(error).__name__}.") from error


def _number(batches: Iterator[Any]) -> Iterator[NumberedRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield number, values


_TEXT_FORMATS: Mapping[str, Callable[[IO[bytes], DataFile, FileFacts], Iterator[NumberedEntry]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}

SUFFIXES = (
    *(text + packed for packed in _COMPRESSIONS for text in _TEXT_FORMATS),
    *(".parquet", ".pq", ".arrow"),
)
"""Endings of the names of data files."""

SUFFIX_RULE = (
    "the names of data files end in .jsonl, .ndjson, .json, .csv or .tsv, each also with .gz, .bz2, .xz or .zst, or in "
    ".parquet, .pq or .arrow"
)
"""``SUFFIXES`` in words."""
