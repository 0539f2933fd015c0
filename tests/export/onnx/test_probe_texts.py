"""The texts of a comparison are built in or come from rows; errors name rows, never texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import tiny_tokenizer

from export.onnx.probe_texts import MAX_ITEMS, built_in_items, encode_items, read_items
from service.errors import DatasetError
from service.records import Exchange, Item, Message
from service.settings import TokenizationSettings
from service.tokenization import Tokenization


def tokenization(max_input_tokens: int = 512) -> Tokenization:
    return Tokenization(
        tiny_tokenizer("llama"), TokenizationSettings(), max_input_tokens=max_input_tokens, vocab_size=400
    )


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_built_in_texts_have_lengths_up_to_the_limit() -> None:
    """Short texts, long ones truncated to the limit, and conversations of many messages."""
    items = built_in_items()

    lengths = [sequence.num_tokens for sequence in encode_items(items, tokenization())]

    assert len(lengths) == len(items)
    assert min(lengths) < 60
    assert max(lengths) == 512
    assert any(isinstance(item.content, Exchange) and len(item.content.prompt) > 5 for item in items)


def test_pairs_are_two_items_and_items_one(tmp_path: Path) -> None:
    """A folder may have files of both kinds of rows, with prompts as strings or as messages."""
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "1.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    write(folder / "2.jsonl", {"prompt": [{"role": "user", "content": "d"}], "completion": "e", "other": 1})

    assert read_items(folder) == [
        Item(Exchange("a", "b")),
        Item(Exchange("a", "c")),
        Item(Exchange((Message("user", "d"),), "e")),
    ]


def test_a_large_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    """Plain transformers scores texts one by one, so their number is limited."""
    rows = ({"prompt": "a", "chosen": str(number), "rejected": "c"} for number in range(MAX_ITEMS))

    assert len(read_items(write(tmp_path / "rows.jsonl", *rows))) == MAX_ITEMS


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "secret"},
        {"prompt": "secret", "completion": 5},
        {"prompt": ["secret"], "completion": "x"},
        {"text": "secret"},
    ],
    ids=["no-completion", "not-a-string", "no-messages", "no-prompt"],
)
def test_an_invalid_row_is_named_by_its_number(tmp_path: Path, row: dict[str, object]) -> None:
    """The message names file and row and shows no text."""
    with pytest.raises(DatasetError, match="row 2") as caught:
        read_items(write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, row))

    assert "secret" not in str(caught.value)


def test_a_single_text_is_refused() -> None:
    """Equal texts count once, and fewer than two have no order to compare."""
    with pytest.raises(DatasetError, match="1 can be compared"):
        encode_items([Item(Exchange("a", "b"))] * 3, tokenization())
