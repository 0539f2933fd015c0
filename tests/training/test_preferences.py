"""Rows of every documented form become the same pair, and what is no pair is named without its text."""

from __future__ import annotations

import json
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
ASKED = [{"role": "user", "content": "Why?"}]
GOOD, POOR = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
PAIR = PreferencePair((Message("user", "Why?"),), "Because.", "No.", id="rows, row 1", source="rows")


def row(**values: Any) -> Row:
    return Row(values, Path("rows"), 1)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": ASKED, "chosen": "Because.", "rejected": "No."},
        {"prompt": ASKED, "chosen": [GOOD], "rejected": [POOR]},
        {"chosen": [*ASKED, GOOD], "rejected": [*ASKED, POOR]},
    ],
    ids=["texts", "explicit-prompt", "implicit-prompt"],
)
def test_all_forms_are_the_same_pair(values: dict[str, Any]) -> None:
    """TRL's conversational forms and plain texts say the same thing."""
    assert parse_pair(row(**values), "rows") == PAIR


def test_a_long_conversation_keeps_all_turns_in_common() -> None:
    """The implicit prompt is everything before the last turn, not just the first."""
    earlier = [*ASKED, POOR, {"role": "user", "content": "Why not?"}]

    pair = parse_pair(row(chosen=[*earlier, GOOD], rejected=[*earlier, POOR]))

    assert pair.prompt == (Message("user", "Why?"), Message("assistant", "No."), Message("user", "Why not?"))
    assert (pair.chosen, pair.rejected) == ("Because.", "No.")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"chosen": CANARY, "rejected": CANARY}, 'there is no "prompt"'),
        ({"chosen": [GOOD], "rejected": [POOR]}, "must have all turns in common but their last"),
        ({"chosen": [*ASKED, GOOD, *ASKED, GOOD], "rejected": [*ASKED, POOR, *ASKED, POOR]}, "all turns in common"),
        ({"chosen": [*ASKED, *ASKED], "rejected": [*ASKED, POOR]}, "an assistant's"),
        ({"prompt": ASKED, "chosen": [*ASKED, GOOD], "rejected": "No."}, '"chosen" must be a text or one assistant'),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "reviews": ["chosen", CANARY]}, '"reviews" must be verdicts'),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "reviews": "chosen"}, '"reviews" must be verdicts'),
    ],
    ids=["texts-alone", "nothing-asked", "early-parting", "user-answers", "two-turns", "odd-verdict", "no-list"],
)
def test_what_is_no_pair_is_named_and_not_shown(values: dict[str, Any], complaint: str) -> None:
    """The error names the place and the rule, never the text."""
    with pytest.raises(DatasetError, match=complaint) as caught:
        parse_pair(row(**values))

    assert "rows, row 1" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_reviews_come_as_a_list_or_by_name() -> None:
    """Reviewers without names are told apart by their places; a tie supports neither side fully."""
    listed = parse_pair(row(prompt="p", chosen="a", rejected="b", reviews=["chosen", "rejected", "tie", "chosen"]))
    named = parse_pair(row(prompt="p", chosen="a", rejected="b", reviews={"ann": "chosen", "bob": None}))

    assert [review.reviewer for review in listed.reviews] == ["1", "2", "3", "4"]
    assert listed.support == 2.5 / 4
    assert named.reviews == (Review("ann", "chosen"),)
    assert PAIR.support is None


def test_parquet_and_json_lines_read_alike(tmp_path: Path) -> None:
    """The same rows, with messages and reviews, from either kind of file."""
    rows = [{"prompt": ASKED, "chosen": "Because.", "rejected": "No.", "reviews": ["chosen", "tie"], "source": "s"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")

    from_lines, from_parquet = read_pairs([tmp_path / "a.jsonl", tmp_path / "b.parquet"])

    assert from_lines.reviews == from_parquet.reviews
    assert (from_lines.prompt, from_lines.source) == (from_parquet.prompt, from_parquet.source) == (PAIR.prompt, "s")
