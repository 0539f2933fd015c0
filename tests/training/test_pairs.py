"""Rows become pairs, and pairs become exactly the token ids that the service would score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from service.errors import DatasetError
from service.messages import read_message
from service.records import Message
from training.pairs import shorten_prompts, tokenize_pairs, tokenize_usable_pairs
from training.preferences import PreferencePair, read_pairs

USER_TEXT = "what a user wrote"
PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def write_row(tmp_path: Path, row: Any) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_prompt_is_a_string_or_a_conversation(tmp_path: Path) -> None:
    """Both forms are read; further keys are ignored."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "How so?"}]
    plain = write_row(tmp_path, PAIR | {"source": "somewhere"})
    (pair,) = read_pairs([plain])
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Why?", "Because.", "No.")

    (pair,) = read_pairs([write_row(tmp_path, PAIR | {"prompt": turns})])

    assert pair.prompt == (Message("user", "Why?"), Message("assistant", "How so?"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": USER_TEXT, "chosen": USER_TEXT}, 'must have "chosen" and "rejected"'),
        (PAIR | {"chosen": [USER_TEXT]}, '"chosen" must be a string or a list of messages'),
        (PAIR | {"prompt": []}, '"prompt" must be a string or a list of messages'),
        (PAIR | {"prompt": [USER_TEXT]}, '"prompt" must be a string or a list of messages'),
        (PAIR | {"prompt": [{"role": "user", "text": USER_TEXT}]}, "has a message that cannot be read"),
    ],
    ids=["no-rejected", "chosen-a-list", "no-messages", "message-a-string", "message-without-content"],
)
def test_an_invalid_pair_is_named_and_not_shown(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    """The error names file, row and key, never the text."""
    path = write_row(tmp_path, row)

    with pytest.raises(DatasetError, match=message) as caught:
        list(read_pairs([path]))

    assert f"{path}, row 1" in str(caught.value)
    assert USER_TEXT not in str(caught.value)


def test_completions_are_rendered_by_the_chat_template() -> None:
    """A completion is the assistant message after the prompt; a plain prompt is one user message."""
    tokenizer = tiny_tokenizer("llama")
    conversation = PreferencePair((Message("user", "Why?"),), "Because.", "No.")
    plain = PreferencePair("Why?", "Because.", "No.")

    tokenized, of_plain = tokenize_pairs([conversation, plain], tokenizer)

    text = "<s><|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause.<|im_end|>\n"
    assert list(tokenized.chosen_ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenized.num_tokens == len(tokenized.chosen_ids) > len(tokenized.rejected_ids)
    assert of_plain.chosen_ids == tokenized.chosen_ids


def test_without_a_template_plain_text_is_joined() -> None:
    """Prompt and completion are joined after the BOS; a conversation cannot be rendered, and its pair is named."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = None
    plain = PreferencePair("Why? ", "Because.", "No.")

    (tokenized,) = tokenize_pairs([plain], tokenizer)

    assert list(tokenized.chosen_ids) == tokenizer("Why? Because.")["input_ids"]
    conversation = PreferencePair((Message("user", "Why?"),), "Because.", "No.", location="pairs.jsonl, row 7")
    with pytest.raises(DatasetError, match=r"pairs.jsonl, row 7 cannot be tokenized: .* no chat template"):
        tokenize_pairs([plain, conversation], tokenizer)


def test_pairs_that_cannot_be_tokenized_are_left_out_and_told() -> None:
    """With their number, the reason, and file and row of the first; if none is left, that is an error."""
    tokenizer = tiny_tokenizer("llama")
    tokenizer.chat_template = None
    plain = PreferencePair("Why? ", "Because.", "No.")
    conversations = [
        PreferencePair((Message("user", "Why?"),), "Because.", "No.", location=f"pairs.jsonl, row {n}") for n in (7, 9)
    ]
    told: list[str] = []

    tokenized = tokenize_usable_pairs([plain, *conversations], tokenizer, tell=told.append)

    assert tokenized == tokenize_pairs([plain], tokenizer)
    assert len(told) == 1
    assert "Left out: 2 of 3 pairs cannot be tokenized (2: The model has no chat template" in told[0]
    assert "the first is pairs.jsonl, row 7" in told[0]
    with pytest.raises(DatasetError, match="2 of 2 pairs cannot be tokenized"):
        tokenize_usable_pairs(conversations, tokenizer)


def test_pairs_of_calls_are_read_and_left_out_of_training(tmp_path: Path) -> None:
    """Training needs one text for each completion; a pair with a call of a tool is counted, and others are trained."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    path = write_row(tmp_path, PAIR | {"chosen": [call], "rejected": [{"role": "assistant", "content": "No."}]})
    (calling,) = read_pairs([path])
    pairs = [calling, PreferencePair("Why? ", "Because.", "No.")]
    told: list[str] = []

    tokenized = tokenize_usable_pairs(pairs, tiny_tokenizer("llama"), tell=told.append)

    assert calling.chosen == (read_message(call),)
    assert (calling.texts, calling.excess_chars) == (("", "No."), -3)
    assert '"name": "add"' in calling.serialized[0]
    assert [pair.pair for pair in tokenized] == pairs[1:]
    assert "1: a completion is not one assistant message of text" in told[0]


def test_long_conversations_lose_their_oldest_exchanges() -> None:
    """Only pairs over the limit are shortened, by as few exchanges as possible; the pair's texts are unchanged."""
    tokenizer = tiny_tokenizer("llama")
    turns = tuple(Message("user" if n % 2 == 0 else "assistant", f"turn {n}") for n in range(7))
    long, short = PreferencePair(turns, "Because.", "No."), PreferencePair(turns[-3:], "Because.", "No.")
    plain = PreferencePair("turn " * 50, "Because.", "No.")
    tokenized = tokenize_pairs([long, short, plain], tokenizer)

    shortened = shorten_prompts(tokenized, tokenizer, max_length=tokenized[1].num_tokens)

    assert [pair.num_dropped_turns for pair in shortened] == [4, 0, 0]
    assert [pair.pair for pair in shortened] == [long, short, plain]
    assert shortened[0].chosen_ids == tokenized[1].chosen_ids
    assert shortened[0].rejected_ids == tokenized[1].rejected_ids
    assert shortened[1:] == tokenized[1:]


def test_the_last_message_is_never_dropped() -> None:
    """A conversation that is too long even without its history stays too long; the selection leaves it out."""
    tokenizer = tiny_tokenizer("llama")
    turns = (Message("user", "Why?"), Message("assistant", "How so?"), Message("user", "Why not?"))
    (tokenized,) = tokenize_pairs([PreferencePair(turns, "Because.", "No.")], tokenizer)

    (shortened,) = shorten_prompts([tokenized], tokenizer, max_length=1)

    assert shortened.num_dropped_turns == 2
    assert shortened.num_tokens > 1
