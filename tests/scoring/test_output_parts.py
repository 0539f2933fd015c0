"""Columns of the output and the files that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from scoring.blocks import InputRow
from scoring.columns import Answer, diagnostic_columns, input_columns, own_columns, scored_columns
from scoring.parts import Format, encode_part, join_parts
from service.data.prompts import PromptCompletions


def write_parts(folder: Path, blocks: list[list[dict[str, Any]]], kind: Format) -> list[Path]:
    parts = []
    for index, rows in enumerate(blocks):
        added = [{"reward": float(index)} for _ in rows]
        part = folder / f"part-{index}.{kind}"
        part.write_bytes(encode_part(rows, added, {"reward": float}, kind, [True] * len(rows)))
        parts.append(part)
    return parts


def joined(folder: Path, blocks: list[list[dict[str, Any]]], kind: Format = "parquet") -> tuple[list[Any], list[str]]:
    out = folder / f"out.{kind}"
    as_json = join_parts(write_parts(folder, blocks, kind), [None] * len(blocks), out, kind, out.name)
    if kind == "parquet":
        return parquet.read_table(out).to_pylist(), as_json
    return [json.loads(line) for line in out.read_bytes().splitlines()], as_json


def test_every_diagnostic_has_one_column_with_a_type() -> None:
    """Names are unique, blocks precede their members, and full adds to basic."""
    basic, full = diagnostic_columns("basic"), diagnostic_columns("full")

    assert set(basic) < set(full)
    assert {"length_completion_tokens", "length_z", "style_p", "group_reward_centered", "calibration"} <= set(basic)
    assert {"ood_p_value", "ood_p_layers_mid", "ood_flag", "reward_std_epistemic", "reward_disagreement"} <= set(full)
    assert full["ood_p_layers_mid"] == (("ood", "p_layers", "mid"), float)
    assert diagnostic_columns("none") == {}


def test_pairs_have_the_columns_of_both_completions() -> None:
    """Each column of an item exists for the chosen and for the rejected completion, and there is a margin."""
    items = set(own_columns("basic", pairs=False, items=True))
    pairs = set(own_columns("basic", pairs=True, items=False))
    common = {"source_file", "source_row", "model_version", "error_code", "error_detail"}

    assert pairs == common | {"margin"} | {side + name for side in ("chosen_", "rejected_") for name in items - common}


def test_a_lower_reward_is_a_column_where_it_is_asked_for() -> None:
    """Each completion has the reward less K disagreements, null where no heads are known; else there is no column."""
    row = InputRow("a", 1, {}, PromptCompletions("p", ("c", "r")))
    answers: list[Answer] = [{"reward": 2.0, "reward_disagreement": 0.5}, {"reward": 1.0, "reward_disagreement": None}]

    asked, not_asked = [scored_columns(row, answers, "v", "full", pessimism) for pessimism in (3.0, None)]

    assert (asked["chosen_reward_lower"], asked["rejected_reward_lower"]) == (0.5, None)
    assert (asked["chosen_reward"], asked["margin"]) == (2.0, 1.0)
    assert "chosen_reward_lower" not in not_asked
    assert own_columns("full", pairs=False, items=True, lower=True)["reward_lower"] is float
    assert "reward_lower" not in own_columns("full", pairs=False, items=True)


def test_an_input_column_of_the_same_name_is_renamed() -> None:
    """No value of the input is lost, also if the input is an earlier output that was renamed already."""
    values = {"prompt": "a", "reward": 1, "input_reward": 2, "input_text": 3}

    assert input_columns(values, "basic") == {
        "prompt": "a",
        "input_reward": 1,
        "input_input_reward": 2,
        "input_text": 3,
    }


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_parts_are_joined_in_order_with_all_columns(tmp_path: Path, kind: Format) -> None:
    """Nested values are as they were, and a column that only one part has is null in the others."""
    message = [{"role": "user", "content": "ü \u2028"}]
    blocks = [[{"prompt": message, "n": 1}], [{"prompt": message, "n": 2, "tag": "x"}]]

    rows, as_json = joined(tmp_path, blocks, kind)

    assert [row["n"] for row in rows] == [1, 2]
    assert [row["reward"] for row in rows] == [0.0, 1.0]
    assert [row["prompt"] for row in rows] == [message, message]
    assert [row.get("tag") for row in rows] == [None, "x"]
    assert as_json == []


def test_values_without_a_common_type_become_json_text(tmp_path: Path) -> None:
    """It is JSON text in all rows of the column, also in the parts where the values had one type; it is told."""
    blocks: list[list[dict[str, Any]]] = [[{"v": "a"}], [{"v": "b"}, {"v": 3}], [{"v": [1.5, None]}], [{"v": None}]]

    rows, as_json = joined(tmp_path, blocks)

    assert [row["v"] and json.loads(row["v"]) for row in rows] == ["a", "b", 3, [1.5, None], None]
    assert as_json == ["v"]


def test_a_malformed_row_does_not_decide_a_type(tmp_path: Path) -> None:
    """The column has the type of the rows that could be parsed; a value that does not fit it is null."""
    content = encode_part(
        [{"v": "a"}, {"v": 3}, {"v": "c"}], [{}, {}, {}], {"reward": float}, "parquet", [True, False, False]
    )
    (tmp_path / "a.parquet").write_bytes(content)

    assert parquet.read_table(tmp_path / "a.parquet").column("v").to_pylist() == ["a", None, "c"]


@pytest.mark.parametrize("value", [{}, "\ud800", 2**70, [{"a": {}}]])
def test_values_that_parquet_cannot_have_are_json_text(tmp_path: Path, value: object) -> None:
    """Nothing that a row may hold ends the job."""
    rows, _ = joined(tmp_path, [[{"v": value}]])

    assert json.loads(rows[0]["v"]) == value


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    """NaN in a list, which Parquet has, is null in JSON lines."""
    rows, _ = joined(tmp_path, [[{"v": [1.0, float("nan"), float("inf")], "b": b"\xff"}]], "jsonl")

    assert rows[0]["v"] == [1.0, None, None]
    assert rows[0]["b"] == "/w=="


def test_types_of_numbers_are_widened(tmp_path: Path) -> None:
    """Whole numbers in one part and fractions in another are one column of numbers."""
    rows, as_json = joined(tmp_path, [[{"v": 1}], [{"v": 0.5}], [{"v": None}]])

    assert [row["v"] for row in rows] == [1.0, 0.5, None]
    assert as_json == []
    assert parquet.read_schema(tmp_path / "out.parquet").field("v").type == pa.float64()
