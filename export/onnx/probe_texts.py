"""The texts on which an exported graph is compared with plain transformers: built-in ones, or rows of a data file.

The built-in texts cover what a graph may get wrong: lengths from a word to the limit, scripts and emoji, code, many
messages, nearly equal answers. This module does not depend on a model.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from service.data.reading import read_examples
from service.errors import DatasetError, HttpError
from service.records import Encoding, Exchange, Item, Message, TokenSequence
from service.tokenization import Tokenization

MAX_TOKENS = 2048
"""Longest text, in tokens. The memory of attention grows with the square of the length, and longer texts would test
nothing else."""

MAX_ITEMS = 400
"""Most texts of a data file; plain transformers scores them one by one, in fp32."""

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


def built_in_items() -> list[Item]:
    """Return the built-in texts: each question with each answer, conversations, and texts of increasing length."""
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
    """Return the items of a data file, at most `MAX_ITEMS`; a pair gives two.

    Raises:
        DatasetError: the file cannot be read, or a row is not valid; names the row, never the text.
    """
    examples = (parsed for _, parsed in read_examples(path))
    items = (Item(exchange) for parsed in examples for exchange in parsed.exchanges())
    return list(islice(items, MAX_ITEMS))


def encode_items(items: list[Item], tokenization: Tokenization) -> list[TokenSequence]:
    """Tokenize the items, with prompts truncated on the left; items that the chat template refuses are left out.

    Raises:
        DatasetError: fewer than two different sequences remain, which have no order to compare.
    """
    outcomes = tokenization.encode(items, Encoding(truncation="prompt_left"))
    sequences = [outcome for outcome in outcomes if not isinstance(outcome, HttpError)]
    different = {sequence.token_ids: sequence for sequence in sequences}
    if len(different) < 2:
        raise DatasetError(f"Of {len(items)} texts, {len(different)} can be compared: pass a file with more.")
    return list(different.values())
