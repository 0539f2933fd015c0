"""Whole files are read in one form, and what was found in them is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.data.reading import read_examples
from service.errors import DatasetError

CANARY = "canary-4c1d"


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ultrafeedback(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": turns(prompt, chosen), "rejected": turns(prompt, rejected), "score_chosen": 8.0}


@pytest.mark.parametrize(
    ("row", "form"),
    [
        (
            ultrafeedback("p", "c", "r"),
            "prompt as text, chosen and rejected as conversations that begin with it",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "prompt, chosen and rejected as texts"),
        (
            {"prompt": turns("p"), "chosen": "c", "rejected": "r"},
            "prompt as a conversation, chosen and rejected as texts",
        ),
        ({"chosen": turns("p", "c"), "rejected": turns("p", "r")}, "chosen and rejected as conversations"),
        (
            {"chosen": "\n\nHuman: p\n\nAssistant: c", "rejected": "\n\nHuman: p\n\nAssistant: r"},
            "chosen and rejected as texts with role markers",
        ),
        (
            {"chosen": "p c", "rejected": "p r"},
            "chosen and rejected as texts; the words that both begin with are the prompt",
        ),
        ({"prompt": "p", "completion": "c"}, "prompt and completion as texts"),
        ({"messages": turns("p", "c")}, "messages as a conversation"),
        (
            {"prompt": "p", "messages": turns("p", "c")},
            "prompt as text, messages as a conversation that begins with it",
        ),
        (
            {"prompt": turns("p"), "completion": turns("", "c")[1:]},
            "prompt as a conversation, completion as a list of assistant messages",
        ),
    ],
)
def test_the_form_is_told_in_one_line(tmp_path: Path, row: dict[str, Any], form: str) -> None:
    """One line per file: its name, its number of rows, and how they are written; no second line without a reason."""
    told: list[str] = []

    list(read_examples(write(tmp_path / "train.jsonl", row), tell=told.append))

    assert told == [f"train.jsonl: 1 row, {form}"]


def test_a_file_of_mixed_forms_is_refused_at_the_first_row_that_differs(tmp_path: Path) -> None:
    """The message has file and line, and both forms."""
    rows = [
        ultrafeedback("p", "c", CANARY),
        ultrafeedback("q", "c", "r"),
        {"prompt": "p", "chosen": CANARY, "rejected": "r"},
    ]
    path = write(tmp_path / "train.jsonl", *rows)

    with pytest.raises(
        DatasetError, match="row 3 has prompt, chosen and rejected as texts, but the rows before"
    ) as error:
        list(read_examples(path))

    assert str(path) in str(error.value)
    assert CANARY not in str(error.value)


def test_files_of_a_folder_may_have_different_forms(tmp_path: Path) -> None:
    """The rule is about one file; each has its own line."""
    told: list[str] = []
    write(tmp_path / "a.jsonl", ultrafeedback("p", "c", "r"))
    write(tmp_path / "b.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"})

    assert len(list(read_examples(tmp_path, tell=told.append))) == 2
    assert [line.partition(":")[0] for line in told] == ["a.jsonl", "b.jsonl"]


def test_properties_of_a_file_are_counted_and_told(tmp_path: Path) -> None:
    """Marks, line ends, blank lines, repeated rows and ties do not change what is read; unusable rows are left out."""
    rows: list[Any] = [
        ultrafeedback("p", "c", "r"),
        None,
        ultrafeedback("p", "c", "r"),
        ultrafeedback("q", "c", "c"),
        {"prompt": "p", "chosen": None, "rejected": turns("p", "r")},
        {"prompt": "p", "chosen": turns("p", "c", "d", "e"), "rejected": turns("p", "r")},
        {"prompt": float("nan"), "chosen": turns("p", "c"), "rejected": turns("p", "r")},
        {"prompt": "p", "chosen": turns("p", "x", "p", "c"), "rejected": turns("p", "y", "p", "r")},
    ]
    path = tmp_path / "train.jsonl"
    text = "".join((json.dumps(row) if row else "") + "\r\n" for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    told: list[str] = []

    found = [row.number for row, _ in read_examples(path, pairs_only=True, tell=told.append)]

    assert found == [1, 3, 4]
    assert told[0] == "train.jsonl: 7 rows, prompt as text, chosen and rejected as conversations that begin with it"
    assert told[1].removeprefix("train.jsonl: ").split("; ") == [
        "a byte-order mark at the start",
        "CRLF line ends",
        "1 blank line",
        "1 row with the same texts as an earlier row (not left out)",
        "1 pair of identical completions (not left out)",
        (
            '4 rows left out: 1 because "chosen" has no value (first: row 5)'
            ", 2 because the conversations differ before their last message (first: row 6)"
            ', 1 because "prompt" has no value (first: row 7)'
        ),
    ]
    assert len(told) == 2


def test_completions_that_begin_with_the_prompt_are_told(tmp_path: Path) -> None:
    """Plain texts are read as they are; a data set that repeats the prompt in them is pointed out."""
    told: list[str] = []
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "p c", "rejected": "p r"})

    ((_, pair),) = read_examples(path, tell=told.append)

    assert pair.completions == ("p c", "p r")
    assert "1 row whose completions begin with the prompt" in told[1]


def test_a_file_without_a_usable_row_is_refused_with_the_reasons(tmp_path: Path) -> None:
    """An empty file and a file of unusable rows have different messages."""
    with pytest.raises(DatasetError, match="has no rows"):
        list(read_examples(write(tmp_path / "empty.jsonl")))
    path = write(tmp_path / "a.jsonl", {"messages": turns("p")}, {"messages": turns("q")})
    with pytest.raises(DatasetError, match="no row that can be used; left out: 2 because the last message is not an"):
        list(read_examples(path))
