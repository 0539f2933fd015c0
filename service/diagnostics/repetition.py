"""Where a text repeats itself: the tokens of 4-grams that occurred before in it, as spans of characters.

The share that ``style.repeat4`` reports counts the same 4-grams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from service.diagnostics.ngrams import WINDOW_TOKENS

_SIZE = 4

Span = tuple[int, int]


def find_repetitions(ids: Sequence[int], spans: Sequence[Span]) -> list[Span]:
    """Return the parts of a text whose 4-grams of tokens occurred before in it.

    Args:
        ids: token ids of the text; the first `WINDOW_TOKENS` are read.
        spans: first character of each token and the character after its last one.

    Returns:
        Spans of characters, in order and without overlap; adjacent ones are joined.
    """
    joined: list[Span] = []
    for begin, end in _repeated(ids[:WINDOW_TOKENS]):
        start, stop = spans[begin][0], spans[end - 1][1]
        if joined and start <= joined[-1][1]:
            start, stop = joined[-1][0], max(stop, joined.pop()[1])
        if stop > start:
            joined.append((start, stop))
    return joined


def _repeated(ids: Sequence[int]) -> Iterator[Span]:
    """Yield the first token of each 4-gram that occurred before, and the token after its last one."""
    seen: set[tuple[int, ...]] = set()
    for begin in range(len(ids) - _SIZE + 1):
        four_gram = tuple(ids[begin : begin + _SIZE])
        if four_gram in seen:
            yield begin, begin + _SIZE
        seen.add(four_gram)
