"""Rows become preference pairs with their source and reviews."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from service.data.rows import Row
from service.errors import DatasetError
from service.records import Message
from training.preferences import PreferencePair, Review, parse_pair, read_pairs

CANARY = "canary-4c1d"
PROMPT = [{"role": "user", "content": "Why?"}]
GOOD, POOR = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
PAIR = PreferencePair((Message("user", "Why?"),), "Because.", "No.", id="rows, row 1", source="rows")


def row(**values: Any) -> Row:
    return Row(values, Path("rows"), 1)


@pytest.mark.parametrize("reviews", [["chosen", CANARY], "chosen"], ids=["unknown-vote", "not-a-list"])
def test_invalid_reviews_are_named_and_not_shown(reviews: object) -> None:
    """The error names file, row and rule, never the text."""
    with pytest.raises(DatasetError, match='rows, row 1: "reviews" must be votes') as caught:
        parse_pair(row(prompt="p", chosen="a", rejected="b", reviews=reviews))

    assert CANARY not in str(caught.value)


def test_a_pair_has_the_texts_of_its_row() -> None:
    """Also of a row with an implicit prompt; the id is the row's location unless the row has one."""
    implicit = row(chosen=[*PROMPT, GOOD], rejected=[*PROMPT, POOR])

    assert parse_pair(implicit, "rows") == PAIR
    assert parse_pair(row(**implicit.values, id=7, source="s"), "rows") == replace(PAIR, id="7", source="s")


def test_reviews_come_as_a_list_or_by_name() -> None:
    """Reviewers without names are numbered; a tie counts one half."""
    listed = parse_pair(row(prompt="p", chosen="a", rejected="b", reviews=["chosen", "rejected", "tie", "chosen"]))
    named = parse_pair(row(prompt="p", chosen="a", rejected="b", reviews={"ann": "chosen", "bob": None}))

    assert [review.annotator for review in listed.reviews] == ["1", "2", "3", "4"]
    assert listed.support == 2.5 / 4
    assert named.reviews == (Review("ann", "chosen"),)
    assert PAIR.support is None


def test_parquet_and_json_lines_give_the_same_pairs(tmp_path: Path) -> None:
    """The same rows, with messages and reviews, from either format."""
    rows = [{"prompt": PROMPT, "chosen": "Because.", "rejected": "No.", "reviews": ["chosen", "tie"], "source": "s"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")

    from_lines, from_parquet = read_pairs([tmp_path / "a.jsonl", tmp_path / "b.parquet"])

    assert from_lines.reviews == from_parquet.reviews
    assert (from_lines.prompt, from_lines.source) == (from_parquet.prompt, from_parquet.source) == (PAIR.prompt, "s")
