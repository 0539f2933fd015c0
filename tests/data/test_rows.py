"""What data files may look like, and how a broken one is named."""

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
def test_json_lines_come_back_in_order(tmp_path: Path, name: str) -> None:
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
    """Files of all kinds are read in the order of their names; other files are passed over."""
    write_lines(tmp_path / "b.jsonl", [{"n": 2}])
    write_lines(tmp_path / "a.jsonl.gz", [{"n": 1}])
    parquet.write_table(pa.Table.from_pylist([{"n": 3}]), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("no data")

    assert values(tmp_path) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_an_empty_line_is_no_row_but_counts(tmp_path: Path) -> None:
    """Row numbers are line numbers, so that an editor finds the place."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}\n')

    assert [(row.values["n"], row.number) for row in read_rows(path)] == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (f'{{"prompt": "{USER_TEXT}"'.encode(), "line 2 is not JSON"),
        (b'["a"]', "line 2 is not a JSON object, but a list"),
        (b'{"prompt": "\xff"}', "line 2 is not JSON in UTF-8"),
        (b"[" * 100_000, "line 2 is not JSON"),
    ],
    ids=["cut-short", "no-object", "no-utf-8", "nested-without-end"],
)
def test_a_broken_line_is_named_and_not_shown(tmp_path: Path, line: bytes, complaint: str) -> None:
    """The error names file and line, and neither it nor what it chains carries the text; rows before it are given."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line + b"\n")
    rows = read_rows(path)
    assert next(rows).values == {"n": 1}

    with pytest.raises(DatasetError) as caught:
        next(rows)

    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert USER_TEXT not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl.gz", b"this is no gzip file"),
        ("rows.jsonl.gz", gzip.compress(b'{"n": 1}\n' * 1000)[:-12]),
        ("rows.parquet", b"this is no Parquet file"),
    ],
    ids=["no-gzip", "gzip-cut-short", "no-parquet"],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """What the libraries raise about a damaged file becomes one DatasetError that names the file."""
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(DatasetError, match="cannot be read") as caught:
        list(read_rows(path))

    assert str(path) in str(caught.value)


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    """A missing path, a file of another kind and a folder without data each get a sentence of their own."""
    (tmp_path / "rows.csv").write_text("a,b\n")
    (tmp_path / "empty").mkdir()

    with pytest.raises(DatasetError, match="does not exist"):
        list(read_rows(tmp_path / "missing.jsonl"))
    with pytest.raises(DatasetError, match="no kind that we read"):
        list(read_rows(tmp_path / "rows.csv"))
    with pytest.raises(DatasetError, match="holds no data file"):
        list(read_rows(tmp_path / "empty"))


def test_a_row_does_not_print_its_text(tmp_path: Path) -> None:
    """A row in a traceback or a log shows its place only."""
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": USER_TEXT}])

    (row,) = read_rows(path)

    assert USER_TEXT not in repr(row)
    assert row.place == f"{path}, row 1"
