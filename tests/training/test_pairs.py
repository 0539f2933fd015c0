"""Rows become pairs, and pairs become exactly the token ids that the service would score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_tokenizer

from service.errors import DatasetError
from service.records import Message
from training.pairs import shorten_prompts, tokenize_pairs
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
        ({"prompt": USER_TEXT, "chosen": USER_TEXT}, '"rejected" must be a string'),
        (PAIR | {"chosen": [USER_TEXT]}, '"chosen" must be a string'),
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
    with pytest.raises(DatasetError, match=r"Pair 1 .* no chat template"):
        tokenize_pairs([plain, PreferencePair((Message("user", "Why?"),), "Because.", "No.")], tokenizer)


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
