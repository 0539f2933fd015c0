"""Statistics of a completion's token ids: how it repeats itself, and what it has of its prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from service.diagnostics.ngrams import WINDOW_TOKENS

TYPE_TOKEN_WINDOW = 100
MIN_FOUR_GRAMS = 20

_THREE_KNOWN = bytes([1, 1, 1])


@dataclass(frozen=True, slots=True)
class TokenFacts:
    """Statistics of the first `WINDOW_TOKENS` token ids of a completion."""

    repeat4: float
    """Share of 4-grams that occurred before in the completion."""

    top4: float
    """Share of the most frequent 4-gram; 0 for `MIN_FOUR_GRAMS` 4-grams or fewer."""

    type_token: float
    """Distinct tokens over tokens, within the first `TYPE_TOKEN_WINDOW` tokens (type-token ratio)."""

    overlap: float
    """Share of tokens that also occur in the prompt."""

    copied: float
    """Share of 3-grams that also occur in the last `WINDOW_TOKENS` of the prompt."""


class PromptTokens:
    """The tokens of a prompt, for its completions.

    Args:
        ids: of the prompt.
    """

    def __init__(self, ids: tuple[int, ...]) -> None:
        self._ids = ids
        self.known = frozenset(ids)
        """Its distinct tokens."""

    @cached_property
    def three_grams(self) -> AbstractSet[tuple[int, int, int]]:
        """The 3-grams of its last `WINDOW_TOKENS`."""
        ids = self._ids[-WINDOW_TOKENS:]
        return set(zip(ids, ids[1:], ids[2:], strict=False))


def completion_tokens(ids: tuple[int, ...], special_ids: AbstractSet[int]) -> tuple[int, ...]:
    """Remove what the chat template appends to a completion: its closing special token and the whitespace after it."""
    for end in range(len(ids) - 1, max(-1, len(ids) - 4), -1):
        if ids[end] in special_ids:
            return ids[:end]
    return ids


def read_tokens(completion: tuple[int, ...], prompt: PromptTokens) -> TokenFacts:
    """Return the token statistics of a completion."""
    ids = completion[:WINDOW_TOKENS]
    if not ids:
        return TokenFacts(0.0, 0.0, 0.0, 0.0, 0.0)
    repeat4, top4 = _repetition(ids)
    first = ids[:TYPE_TOKEN_WINDOW]
    is_known = bytes(map(prompt.known.__contains__, ids))
    return TokenFacts(
        repeat4=repeat4,
        top4=top4,
        type_token=len(set(first)) / len(first),
        overlap=is_known.count(1) / len(ids),
        copied=_share_copied(ids, prompt) if _THREE_KNOWN in is_known else 0.0,
    )


def _repetition(ids: tuple[int, ...]) -> tuple[float, float]:
    """Return the share of 4-grams that occurred before, and that of the most frequent one."""
    num = len(ids) - 3
    if num <= 0:
        return 0.0, 0.0
    distinct = len(set(zip(ids, ids[1:], ids[2:], ids[3:], strict=False)))
    largest = 1
    if distinct < num and num > MIN_FOUR_GRAMS:
        largest = max(Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False)).values())
    return 1 - distinct / num, largest / num if num > MIN_FOUR_GRAMS else 0.0


def _share_copied(ids: tuple[int, ...], prompt: PromptTokens) -> float:
    copied = map(prompt.three_grams.__contains__, zip(ids, ids[1:], ids[2:], strict=False))
    return sum(copied) / (len(ids) - 2)
