"""Writes the rows of a block as bytes of a part file, and joins part files into the output.

Columns of ours have fixed types. In Parquet a column of the input whose values have no common type is written as JSON
text. JSON lines have every value as it was.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

from scoring.columns import RANK_COLUMN

Format: TypeAlias = Literal["jsonl", "parquet"]

OUTPUT_SUFFIXES: Mapping[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson.gz": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""Endings of the names of output files."""

ROW_GROUP_ROWS = 16_384
_GZIP_LEVEL = 5
_AS_JSON = {b"reward-score": b"json"}
"""Marks a column of a part file whose values are JSON text."""

Rank: TypeAlias = Mapping[int, int]
"""Indices of the selected rows of a part, with their ranks."""


def format_of(name: str) -> Format | None:
    """Return the format of an output file by its name; None for a folder."""
    return next((kind for suffix, kind in OUTPUT_SUFFIXES.items() if name.lower().endswith(suffix)), None)


def encode_part(
    inputs: Sequence[Mapping[str, Any]],
    added: Sequence[Mapping[str, Any]],
    own: Mapping[str, type],
    kind: Format,
    is_valid: Sequence[bool],
) -> bytes:
    """Return the rows of a block as a file.

    Args:
        inputs: the columns of the input, by row.
        added: the columns that are added, by row; absent ones are null.
        own: names and types of the columns that are added.
        kind: of the file.
        is_valid: for each row whether it could be parsed. Other rows do not decide the type of a column of Parquet; of
            their values those are null that do not fit it.
    """
    if kind == "jsonl":
        rows = ({**given, **{name: more.get(name) for name in own}} for given, more in zip(inputs, added, strict=True))
        return b"".join(map(_json_line, rows))
    return _encode_parquet(inputs, added, own, is_valid)


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json_line(row: Mapping[str, Any]) -> bytes:
    return _json(row).encode() + b"\n"


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain)
        text.encode()
    except (ValueError, TypeError, UnicodeEncodeError):  # NaN in a list, keys that are no texts, a lone surrogate
        text = json.dumps(_finite(value), allow_nan=False, default=_plain)
    return text


def _plain(value: Any) -> Any:
    """Return a value of Parquet that JSON does not have as a text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(member) for member in value]
    is_finite = not isinstance(value, float) or abs(value) < float("inf")
    return value if is_finite else None


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _encode_parquet(
    inputs: Sequence[Mapping[str, Any]],
    added: Sequence[Mapping[str, Any]],
    own: Mapping[str, type],
    is_valid: Sequence[bool],
) -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    names = dict.fromkeys(name for row in inputs for name in row)
    columns = [_input_column(name, [row.get(name) for row in inputs], is_valid) for name in names]
    for name, kind in own.items():
        array = pa.array([row.get(name) for row in added], type=_arrow_type(kind))
        columns.append((pa.field(name, array.type), array))
    sink = io.BytesIO()
    schema = pa.schema([member for member, _ in columns])
    parquet.write_table(pa.table([array for _, array in columns], schema=schema), sink)
    return sink.getvalue()


def _arrow_type(kind: type) -> Any:
    import pyarrow as pa

    return {float: pa.float64(), int: pa.int64(), bool: pa.bool_(), str: pa.string()}[kind]


def _input_column(name: str, values: Sequence[Any], is_valid: Sequence[bool]) -> tuple[Any, Any]:
    """Return the field and the values of a column of the input."""
    import pyarrow as pa

    valid = [value if row_is_valid else None for value, row_is_valid in zip(values, is_valid, strict=True)]
    array = _array(valid)
    if array is not None and not pa.types.is_null(array.type):
        fitting = [_fits(value, array.type) for value in values] if valid != values else []
        if fitting:
            array = pa.array([value if fits else None for value, fits in zip(values, fitting, strict=True)], array.type)
        return pa.field(name, array.type), array
    if array is not None and (array := _array(values)) is not None:
        return pa.field(name, array.type), array
    return pa.field(name, pa.string(), metadata=_AS_JSON), _json_array(values)


def _array(values: Sequence[Any], kind: Any = None) -> Any:
    """Return an array of Arrow, or None if the values have no common type that Parquet can write."""
    import pyarrow as pa

    try:
        array = pa.array(values, type=kind)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError):
        return None
    return None if _has_empty_struct(array.type) else array


def _fits(value: Any, kind: Any) -> bool:
    return value is None or _array([value], kind) is not None


def _json_array(values: Iterable[Any]) -> Any:
    import pyarrow as pa

    return pa.array([None if value is None else _json(value) for value in values], type=pa.string())


def _has_empty_struct(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))
    return pa.types.is_list(kind) and _has_empty_struct(kind.value_type)


def _common_schema(parts: Sequence[Path]) -> tuple[Any, frozenset[str]]:
    """Return the schema of all parts together, and the columns that must become JSON text for it."""
    import pyarrow as pa
    from pyarrow import parquet

    kinds: dict[str, list[Any]] = {}
    as_json = set()
    for part in parts:
        for member in parquet.read_schema(part):
            found = kinds.setdefault(member.name, [])
            if member.type not in found:
                found.append(member.type)
            if _is_json(member):
                as_json.add(member.name)
    fields = []
    for name, found in kinds.items():
        try:
            common = pa.unify_schemas([pa.schema([(name, kind)]) for kind in found], promote_options="permissive")
        except pa.ArrowException:
            as_json.add(name)
        fields.append(pa.field(name, pa.string()) if name in as_json else common.field(name))
    return pa.schema(fields), frozenset(as_json)


def _is_json(member: Any) -> bool:
    return any((member.metadata or {}).get(key) == value for key, value in _AS_JSON.items())


def _read_part(part: Path, schema: Any, as_json: frozenset[str], rank: Rank | None) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(part)
    if rank is not None:
        table = table.take(pa.array(sorted(rank), pa.int64()))
    columns = {member.name: _conformed(table, member, as_json) for member in schema}
    result = pa.table(columns, schema=schema)
    if rank is None:
        return result
    return result.append_column(RANK_COLUMN, pa.array([rank[index] for index in sorted(rank)], pa.int64()))


def _conformed(table: Any, member: Any, as_json: frozenset[str]) -> Any:
    import pyarrow as pa

    if member.name not in table.column_names:
        return pa.nulls(table.num_rows, member.type)
    column = table.column(member.name)
    if member.name in as_json:
        return column if _is_json(table.schema.field(member.name)) else _json_array(column.to_pylist())
    if column.type == member.type:
        return column
    try:
        return column.cast(member.type)
    except pa.ArrowException:
        return pa.array(column.to_pylist(), type=member.type)


# --- Joining ---------------------------------------------------------------------------------------------------------


def join_parts(parts: Sequence[Path], ranks: Sequence[Rank | None], out: Path, kind: Format, name: str) -> list[str]:
    """Write the parts as one file, and return the input's columns that are JSON text because their types differ.

    Args:
        parts: in the order of the input.
        ranks: for each part the rows to write; None: all.
        out: the file.
        kind: of the parts and of the file.
        name: of the output, which may end in ``.gz``.
    """
    if kind == "jsonl":
        with _opened(out, name) as file:
            for part, rank in zip(parts, ranks, strict=True):
                file.writelines(_lines(part, rank))
        return []
    from pyarrow import parquet

    schema, as_json = _common_schema(parts)
    writer_schema = schema if all(rank is None for rank in ranks) else _with_rank(schema)
    with parquet.ParquetWriter(out, writer_schema) as writer:
        tables = (_read_part(part, schema, as_json, rank) for part, rank in zip(parts, ranks, strict=True))
        for table in _row_groups(tables):
            writer.write_table(table)
    return sorted(as_json)


def write_folder(parts: Sequence[Path], ranks: Sequence[Rank | None], out: Path, kind: Format) -> list[str]:
    """Write the parts as files of a folder whose names are in the order of the input; returns as `join_parts` does."""
    if kind == "jsonl":
        for part, rank in zip(parts, ranks, strict=True):
            with (out / part.name).open("wb") as file:
                file.writelines(_lines(part, rank))
        return []
    from pyarrow import parquet

    schema, as_json = _common_schema(parts)
    for part, rank in zip(parts, ranks, strict=True):
        parquet.write_table(_read_part(part, schema, as_json, rank), out / part.name)
    return sorted(as_json)


def _with_rank(schema: Any) -> Any:
    import pyarrow as pa

    return schema.append(pa.field(RANK_COLUMN, pa.int64()))


def _row_groups(tables: Iterable[Any]) -> Iterator[Any]:
    """Combine small tables, since a row group of few rows is read slowly."""
    import pyarrow as pa

    waiting: list[Any] = []
    for table in tables:
        waiting.append(table)
        if sum(one.num_rows for one in waiting) >= ROW_GROUP_ROWS:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


_OPENERS: Mapping[bool, Callable[[Path], Any]] = {
    True: lambda out: gzip.GzipFile(out, "wb", compresslevel=_GZIP_LEVEL, mtime=0),
    False: lambda out: out.open("wb"),
}


def _opened(out: Path, name: str) -> Any:
    return _OPENERS[name.lower().endswith(".gz")](out)


def _lines(part: Path, rank: Rank | None) -> Iterator[bytes]:
    with part.open("rb") as file:
        if rank is None:
            yield from file
            return
        for index, line in enumerate(file):
            if index in rank:
                yield _json_line(json.loads(line) | {RANK_COLUMN: rank[index]})
