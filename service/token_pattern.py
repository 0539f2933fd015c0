"""Where a pattern of token ids stands in a sequence."""

from __future__ import annotations

from collections.abc import Sequence


def last_occurrence(ids: Sequence[int], pattern: Sequence[int]) -> int | None:
    """Return the index of the first token of the last occurrence of a pattern; None where there is none.

    Args:
        ids: token ids.
        pattern: at least one token id.
    """
    ids, pattern = tuple(ids), tuple(pattern)
    for begin in range(len(ids) - len(pattern), -1, -1):
        if ids[begin] == pattern[0] and ids[begin : begin + len(pattern)] == pattern:
            return begin
    return None
