"""The texts on which an exported graph is compared with plain transformers: made-up ones, or rows of a file.

They try what graphs get wrong: lengths from a word to the limit, scripts and emoji, code, many turns, near-equal
answers. It knows texts and tokens, not models.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from service.data.rows import Row, read_rows
from service.errors import DatasetError, HttpError
from service.records import Encoding, Exchange, Item, Message, TokenSequence
from service.tokenization import Tokenization

LONGEST = 2048
"""Tokens of the longest text: attention's memory grows with the square, and a graph that is right here is right."""

MAX_ITEMS = 400
"""Texts of a file that are compared; plain transformers takes them one by one, in fp32."""

_QUESTIONS = (
    "How do I boil an egg?",
    "Wie heißt die Hauptstadt von Frankreich?",
    "请解释一下什么是奖励模型。",
    "اكتب جملة قصيرة عن البحر.",
    "Write a Python function that reverses a list.",
    "Is it safe to mix bleach and vinegar? 🤔",
    "Summarise the plot of Romeo and Juliet in two sentences.",
    "What is 17 * 23?",
)
_ANSWERS = (
    "No.",
    "I am sorry, but I cannot help with that.",
    "Sure! Here is what you asked for, step by step:\n\n1. Read the question.\n2. Think.\n3. Answer.",
    "Put it into boiling water for eight minutes, then cool it under the tap.",
    "def reverse(values):\n    return values[::-1]  # a copy, back to front",
    "Die Hauptstadt von Frankreich ist Paris. 🇫🇷",
    "奖励模型读一段对话, 给出一个分数。",
    "Great question!!! You are **so** smart. " * 3,
)
_SENTENCE = "The committee met on Tuesday, weighed both proposals with care, and postponed its decision once more. "


def made_up_items() -> list[Item]:
    """Return the built-in texts: each question with each answer, conversations, and ever longer texts."""
    items = [Item(Exchange(question, answer)) for question in _QUESTIONS for answer in _ANSWERS]
    for turns in (2, 4, 6):
        history = tuple(
            Message("user" if turn % 2 == 0 else "assistant", (_QUESTIONS if turn % 2 == 0 else _ANSWERS)[turn % 8])
            for turn in range(2 * turns - 1)
        )
        items += [Item(Exchange(history, answer)) for answer in _ANSWERS[:3]]
    items += [
        Item(Exchange(_SENTENCE * repeats + _QUESTIONS[repeats % 8], _ANSWERS[(repeats + 3) % 8]))
        for repeats in (4, 9, 20, 45, 130)
    ]
    return items


def read_items(path: Path) -> list[Item]:
    """Return the texts of a data file, at most `MAX_ITEMS`: rows of items, or of pairs, which are two each.

    Raises:
        DatasetError: the file cannot be read, or a row is neither; names the row, never the text.
    """
    return list(islice((item for row in read_rows(path) for item in _items_of(row)), MAX_ITEMS))


def _items_of(row: Row) -> Iterator[Item]:
    prompt = _prompt_of(row)
    completions = [row.values.get(key) for key in ("completion", "chosen", "rejected") if key in row.values]
    if not completions or not all(isinstance(completion, str) for completion in completions):
        raise DatasetError(f"{row.place} has neither a completion nor chosen and rejected ones as texts.")
    for completion in completions:
        yield Item(Exchange(prompt, str(completion)))


def _prompt_of(row: Row) -> str | tuple[Message, ...]:
    prompt: Any = row.values.get("prompt")
    if isinstance(prompt, str):
        return prompt
    try:
        return tuple(Message(str(turn["role"]), str(turn["content"])) for turn in prompt)
    except (TypeError, KeyError):
        raise DatasetError(f"{row.place} has no prompt that is a text or a list of messages.") from None


def encode_items(items: list[Item], tokenization: Tokenization) -> list[TokenSequence]:
    """Tokenize the texts, cutting prompts from the left; what the model's template refuses is left out.

    Raises:
        DatasetError: fewer than two different texts are left, so that there is no order to compare.
    """
    outcomes = tokenization.encode(items, Encoding(truncation="prompt_left"))
    sequences = [outcome for outcome in outcomes if not isinstance(outcome, HttpError)]
    different = {sequence.token_ids: sequence for sequence in sequences}
    if len(different) < 2:
        raise DatasetError(f"Of {len(items)} texts, {len(different)} can be compared: name a file with more.")
    return list(different.values())
