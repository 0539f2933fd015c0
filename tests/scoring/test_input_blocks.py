"""Rows of a job: which block they are in, and what becomes of those that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from scoring.blocks import Block, read_blocks
from scoring.sources import divide, find_files

ROW = {"prompt": "Why?", "completion": "So."}


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def blocks_of(*files: Path, block_rows: int = 100) -> list[Block]:
    return list(read_blocks(0, files, block_rows))


def test_bad_rows_are_errors_with_file_and_number(tmp_path: Path) -> None:
    """Each kind of bad row has its code and its location, and the rows after it are read."""
    nothing = {"prompt": "Why?", "completion": None}
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    rows: list[object] = [ROW, "not json", "[1]", {"completion": "So."}, nothing, pair, ROW | {"prompt": 3}, "", ROW]
    file = write(tmp_path / "a.jsonl", rows)

    (block,) = blocks_of(file)

    assert [(row.number, row.error and row.error.code) for row in block.rows] == [
        (1, None),
        (2, "malformed_row"),
        (3, "malformed_row"),
        (4, "malformed_row"),
        (5, "unusable_row"),
        (6, "malformed_row"),
        (7, "malformed_row"),
        (9, None),
    ]
    assert all(str(file) in row.error.detail and str(row.number) in row.error.detail for row in block.rows if row.error)
    assert len(block.items()) == 2


def test_a_file_that_ends_early_is_one_error_and_the_next_is_read(tmp_path: Path) -> None:
    """The rows before the damage and those of the next file are items; the damage is a row."""
    content = gzip.compress("".join(json.dumps(ROW | {"n": n}) + "\n" for n in range(5000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(content[: len(content) // 2])
    write(tmp_path / "b.jsonl", [ROW])

    rows = [row for block in blocks_of(tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl") for row in block.rows]

    assert [row.error.code for row in rows if row.error] == ["unreadable_file"]
    assert len(rows) > 100
    assert rows[-1].source.endswith("b.jsonl")


def test_a_block_does_not_end_between_rows_of_one_prompt(tmp_path: Path) -> None:
    """Completions of one prompt stay together, up to twice the size of a block."""
    prompts = ["a"] * 3 + ["b"] * 3 + ["c"] * 9
    file = write(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": "So."} for prompt in prompts])

    sizes = [[row.values["prompt"] for row in block.rows] for block in blocks_of(file, block_rows=4)]

    assert ["".join(size) for size in sizes] == ["aaabbb", "cccccccc", "c"]


def test_rows_of_one_group_stay_together(tmp_path: Path) -> None:
    """A column that names the group counts instead of the prompt."""
    rows = [{"prompt": str(n), "completion": "So.", "group": n // 3} for n in range(6)]

    sizes = [len(block.rows) for block in blocks_of(write(tmp_path / "a.jsonl", list(rows)), block_rows=2)]

    assert sizes == [3, 3]


def test_blocks_are_the_same_at_every_reading_and_show_a_change(tmp_path: Path) -> None:
    """Keys and digests are those of the first reading; a changed value changes the digest of its block alone."""
    rows: list[object] = [ROW | {"prompt": str(n)} for n in range(10)]
    before = blocks_of(write(tmp_path / "a.jsonl", rows), block_rows=5)
    rows[7] = ROW | {"prompt": "other"}
    after = blocks_of(write(tmp_path / "a.jsonl", rows), block_rows=5)

    assert [block.key for block in before] == [(0, 0), (0, 1)] == [block.key for block in after]
    assert before[0].digest == after[0].digest
    assert before[1].digest != after[1].digest


def test_units_are_runs_of_files_of_a_minimum_size(tmp_path: Path) -> None:
    """Small files share a unit, a large one ends it, and every file is in one unit, in order."""
    for name, size in (("a", 3), ("b", 4), ("c", 20), ("d", 1)):
        (tmp_path / f"{name}.jsonl").write_text("x" * size)

    units = divide(find_files(str(tmp_path)), unit_bytes=5)

    assert [[file.name for file in unit] for unit in units] == [["a.jsonl", "b.jsonl"], ["c.jsonl"], ["d.jsonl"]]
