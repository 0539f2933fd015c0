"""Which data files are read, and how the message of an invalid one names it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from service.data.rows import read_rows
from service.errors import DatasetError

ROWS = [
    {"prompt": "one", "n": 1},
    {"prompt": [{"role": "user", "content": "two"}], "n": 2},
    {"prompt": "drei ✓", "n": 3},
]
USER_TEXT = "what a user wrote"


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def values(path: Path) -> list[dict[str, object]]:
    return [row.values for row in read_rows(path)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_are_read_in_order(tmp_path: Path, name: str) -> None:
    """Plain and gzipped files give the same rows, in file order."""
    path = write_lines(tmp_path / name, ROWS)

    assert values(path) == ROWS


def test_parquet_rows_are_dictionaries(tmp_path: Path) -> None:
    """A Parquet file gives the same plain values as JSON lines, nested ones included."""
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "n": n} for n in range(5)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=2)

    read = list(read_rows(tmp_path / "rows.parquet"))

    assert [row.values for row in read] == rows
    assert [row.number for row in read] == [1, 2, 3, 4, 5]


def test_a_folder_is_its_data_files_in_name_order(tmp_path: Path) -> None:
    """Files of all formats are read in the order of their names, others are ignored; a pattern selects files too."""
    write_lines(tmp_path / "b.jsonl", [{"n": 2}])
    write_lines(tmp_path / "a.jsonl.gz", [{"n": 1}])
    parquet.write_table(pa.Table.from_pylist([{"n": 3}]), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("not a data file")
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "dataset_info.json").write_text("{}")

    assert values(tmp_path) == values(tmp_path / "*") == values(tmp_path / "[a-c].*") == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_an_empty_line_is_counted_but_not_a_row(tmp_path: Path) -> None:
    """Row numbers are line numbers, so that a row can be found in an editor."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}\n')

    assert [(row.values["n"], row.number) for row in read_rows(path)] == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f'{{"prompt": "{USER_TEXT}"'.encode(), "line 2 is not JSON"),
        (b'["a"]', "line 2 is not a JSON object, but a list"),
        (b'{"prompt": "\xff"}', "line 2 is not JSON in UTF-8"),
        (b"[" * 100_000, "line 2 is not JSON"),
    ],
    ids=["truncated", "not-an-object", "not-utf-8", "nested-too-deep"],
)
def test_an_invalid_line_is_named_and_not_shown(tmp_path: Path, line: bytes, message: str) -> None:
    """The error names file and line, and neither it nor its cause contains the text; earlier rows are yielded."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b"\n")
    rows = read_rows(path)
    assert next(rows).values == {"n": 1}

    with pytest.raises(DatasetError) as caught:
        next(rows)

    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert USER_TEXT not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", b"not a gzip file"),
        ("rows.jsonl.gz", gzip.compress(b'{"n": 1}\n' * 1000)[:-12]),
        ("rows.parquet", b"not a Parquet file"),
    ],
    ids=["not-gzip", "truncated-gzip", "not-parquet"],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """The libraries' exceptions about a damaged file become one DatasetError that names the file."""
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DatasetError, match="cannot be read") as caught:
        list(read_rows(path))

    assert str(path) in str(caught.value)


def test_a_path_without_data_is_refused(tmp_path: Path) -> None:
    """A missing path, a file with another ending and a folder without data files have different messages."""
    (tmp_path / "rows.txt").write_text("a,b\n")
    (tmp_path / "empty").mkdir()

    with pytest.raises(DatasetError, match="does not exist"):
        list(read_rows(tmp_path / "missing.jsonl"))
    with pytest.raises(DatasetError, match="is not a data file"):
        list(read_rows(tmp_path / "rows.txt"))
    with pytest.raises(DatasetError, match="No data file matches"):
        list(read_rows(tmp_path / "*.jsonl"))
    with pytest.raises(DatasetError, match=r"has no data file; .* \.csv .* \.parquet"):
        list(read_rows(tmp_path / "empty"))


def test_a_row_does_not_print_its_text(tmp_path: Path) -> None:
    """A row in a traceback or a log shows its location only."""
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": USER_TEXT}])

    (row,) = read_rows(path)

    assert USER_TEXT not in repr(row)
    assert row.location == f"{path}, row 1"
