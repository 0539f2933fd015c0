"""Every file format and compression gives the same rows, and a damaged file is named without its text."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from service.data.decoders import SUFFIX_RULE, SUFFIXES, FileFacts, read_file
from service.errors import DatasetError

CANARY = "canary-4c1d"
ROWS: list[dict[str, Any]] = [
    {"prompt": "one\ntwo", "completion": 'a "quoted", text', "n": "1"},
    {"prompt": "drei ✓", "completion": "\r", "n": "2"},
    {"prompt": "four; five\tsix", "completion": "x" * 200_000, "n": None},
]


def as_csv(delimiter: str = ",") -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def as_lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def as_arrow(new: Callable[..., Any]) -> bytes:
    table, sink = pa.Table.from_pylist(ROWS), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue().to_pybytes())


def as_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=2)
    return bytes(sink.getvalue().to_pybytes())


def read(path: Path, content: bytes) -> tuple[list[int], list[dict[str, Any]], FileFacts]:
    path.write_bytes(content)
    facts = FileFacts()
    rows = list(read_file(path, facts))
    return [number for number, _ in rows], [values for _, values in rows], facts


@pytest.mark.parametrize(
    ("name", "content", "numbers"),
    [
        ("rows.jsonl", as_lines(), [1, 2, 3]),
        ("rows.ndjson", as_lines(), [1, 2, 3]),
        ("ROWS.JSONL", as_lines(), [1, 2, 3]),
        ("rows.json", as_lines(), [1, 2, 3]),
        ("rows.json", json.dumps(ROWS, indent=1).encode(), [1, 2, 3]),
        ("rows.json", json.dumps({"version": 1, "data": ROWS}).encode(), [1, 2, 3]),
        ("rows.json", json.dumps({"rows": ROWS, "data": None}).encode(), [1, 2, 3]),
        ("rows.csv", as_csv(), [2, 4, 6]),
        ("rows.csv", as_csv(";"), [2, 4, 6]),
        ("rows.tsv", as_csv("\t"), [2, 4, 6]),
        ("rows.parquet", as_parquet(), [1, 2, 3]),
        ("rows.pq", as_parquet(), [1, 2, 3]),
        ("rows.arrow", as_arrow(pa.ipc.new_stream), [1, 2, 3]),
        ("rows.arrow", as_arrow(pa.ipc.new_file), [1, 2, 3]),
        ("rows.jsonl.gz", gzip.compress(as_lines()), [1, 2, 3]),
        ("rows.json.bz2", bz2.compress(json.dumps(ROWS).encode()), [1, 2, 3]),
        ("rows.csv.xz", lzma.compress(as_csv()), [2, 4, 6]),
        ("rows.jsonl.zst", pa.compress(as_lines(), codec="zstd", asbytes=True), [1, 2, 3]),
    ],
    ids=["jsonl", "ndjson", "upper-case", "json-lines-as-json", "json-array", "json-data", "json-rows", "csv",
         "csv-semicolons", "tsv", "parquet", "pq", "arrow-stream", "arrow-file", "gz", "bz2", "xz", "zst"],
)  # fmt: skip
def test_all_formats_give_the_same_rows(tmp_path: Path, name: str, content: bytes, numbers: list[int]) -> None:
    """Texts are unchanged, a missing value is None, and numbers are lines of text files, else rows from 1."""
    found, values, facts = read(tmp_path / name, content)

    assert values == ROWS
    assert found == numbers
    assert not facts.has_byte_order_mark


@pytest.mark.parametrize(("name", "line"), [("a.jsonl", '{"n": %d}'), ("a.csv", "%d")], ids=["json-lines", "csv"])
def test_marks_line_ends_and_blank_lines_do_not_change_rows(tmp_path: Path, name: str, line: str) -> None:
    """A byte-order mark, CRLF and blank lines are skipped and counted; the numbers of rows are those of an editor."""
    header = [] if name == "a.jsonl" else ["prompt"]
    lines = [*header, line % 1, "", line % 2, ""]

    found, values, facts = read(tmp_path / name, b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())

    assert [str(next(iter(row.values()))) for row in values] == ["1", "2"]
    assert found == [1 + len(header), 3 + len(header)]
    assert facts == FileFacts(has_byte_order_mark=True, has_crlf=True, num_blank_lines=2)


def test_nan_is_a_missing_value(tmp_path: Path) -> None:
    """NaN, which pandas writes for a missing text, becomes None, from JSON and from Parquet."""
    table = pa.table({"prompt": ["p"], "n": [float("nan")]})
    parquet.write_table(table, tmp_path / "rows.parquet")

    _, (from_json,), _ = read(tmp_path / "rows.jsonl", b'{"prompt": "p", "n": NaN}')
    ((_, from_parquet),) = read_file(tmp_path / "rows.parquet", FileFacts())

    assert from_json == from_parquet == {"prompt": "p", "n": None}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", json.dumps([{"prompt": CANARY}], indent=1).encode(), r"line 1 is not JSON .* end in \.json"),
        ("a.jsonl", f'{{"prompt": "{CANARY}"}}'.encode("utf-16"), "is in UTF-16: save it in UTF-8"),
        ("a.json", f'[{{"prompt": "{CANARY}"}}, 5]'.encode(), "row 2 is not a JSON object, but a int"),
        ("a.json", f'[{{"prompt": "{CANARY}"'.encode(), "is not JSON in UTF-8"),
        ("a.json", f'{{"prompt": {{"0": "{CANARY}"}}}}'.encode(), 'must be a list, .* "data" or "rows"'),
        ("a.json", b'{"data": [], "rows": []}', 'under either "data" or "rows"'),
        ("a.csv", f"prompt,completion\n{CANARY},b,c\n".encode(), "row 2 has 3 fields; the header has 2"),
        ("a.csv", f'prompt,completion\na,b\n"{CANARY}\n'.encode(), "row at line 3 is not CSV"),
        ("a.csv", f"{CANARY},b\n".encode(), "must begin with a header"),
        ("a.csv", b"prompt,prompt\n", "two columns of the same name"),
        ("a.csv", b"prompt,completion\n\xff,b\n", "is not in UTF-8"),
        ("a.arrow", b"not Arrow", "cannot be read as Arrow"),
        ("a.csv.bz2", b"not bzip2", "cannot be read"),
        ("a.csv.xz", b"not xz", "cannot be read"),
        ("a.csv.zst", b"not zstandard", "cannot be read"),
    ],
    ids=["array-as-lines", "utf-16", "number", "cut-off", "columns", "two-lists", "too-many-fields", "open-quote",
         "no-header", "two-columns", "latin-1", "not-arrow", "not-bz2", "not-xz", "not-zst"],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """It names the file, and the row where there is one, never the text."""
    with pytest.raises(DatasetError, match=message) as caught:
        read(tmp_path / name, content)

    assert str(tmp_path / name) in str(caught.value)
    assert CANARY not in str(caught.value)
    assert caught.value.__context__ is None or caught.value.__suppress_context__ or "cannot be read" in message


def test_the_rule_names_every_ending() -> None:
    """A user who gives another file reads what works."""
    assert all(f".{part}" in SUFFIX_RULE for suffix in SUFFIXES for part in suffix.split(".")[1:])
