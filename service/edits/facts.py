"""Makes a fluent answer wrong: other numbers, or the opposite of a word where there is no number."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from service.edits.edits import Draft
from service.edits.phrases import Phrases

_DIGITS = re.compile(r"\d{1,18}")
_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve", "twenty", "fifty")
_OPPOSITES = {
    "more": "less", "less": "more", "always": "never", "never": "always", "before": "after", "after": "before",
    "increase": "decrease", "decrease": "increase", "many": "few", "few": "many", "first": "last", "last": "first",
    "high": "low", "low": "high", "good": "bad", "bad": "good", "can": "cannot", "cannot": "can", "is": "is not",
    "are": "are not", "will": "will not", "should": "should not", "have": "do not have",
}  # fmt: skip
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBERS)})\b")
_OPPOSITE = re.compile(rf"\b(?:{'|'.join(_OPPOSITES)})\b")


def swap_numbers(draft: Draft, rng: random.Random, strength: int, _phrases: Phrases) -> str:
    """Replace ``strength`` numbers by others; of a text without any, words by their opposites."""
    text = draft.completion
    if _DIGITS.search(text):
        return _replaced(_DIGITS, lambda found: _other_number(found, rng), text, strength)
    if _NUMBER_WORD.search(text):
        return _replaced(
            _NUMBER_WORD, lambda found: rng.choice([one for one in _NUMBERS if one != found]), text, strength
        )
    return _replaced(_OPPOSITE, _OPPOSITES.__getitem__, text, strength)


def _replaced(pattern: re.Pattern[str], replacement: Callable[[str], str], text: str, count: int) -> str:
    return pattern.sub(lambda match: replacement(match.group()), text, count=count)


def _other_number(digits: str, rng: random.Random) -> str:
    """Return another number with as many digits."""
    low = 10 ** (len(digits) - 1) if len(digits) > 1 else 0
    number = rng.randint(low, 10 ** len(digits) - 2)
    return str(number if number < int(digits) else number + 1)
