"""The tree of shared beginnings among token sequences, laid out as one row that holds every shared token once.

Pure: lists of ids in, positions out; no torch. A queue prices a batch by it, and an engine computes what it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""First and one-past-last position in the row."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Where one sequence stands in the row.

    ``spans``: the pieces of the row that are its tokens, in order. ``num_shared``: its leading tokens that another
    sequence owns; what remains is its own and stands in one piece, ``own``, which is empty where all is shared.
    """

    spans: tuple[Span, ...]
    num_shared: int
    own: Span

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.num_shared + self.num_own

    @property
    def num_own(self) -> int:
        """Tokens that are computed for this sequence."""
        return self.own[1] - self.own[0]

    def place(self, position: int) -> int:
        """Return where in the row the token at this position of the sequence stands."""
        for begin, end in self.spans:
            if position < end - begin:
                return begin + position
            position -= end - begin
        raise IndexError("The sequence has no token at this position")

    def spans_from(self, position: int) -> tuple[Span, ...]:
        """Return the pieces that hold the sequence from this position on."""
        pieces = []
        for begin, end in self.spans:
            if position < end - begin:
                pieces.append((begin + max(position, 0), end))
            position -= end - begin
        return tuple(pieces)


def grow_branches(rows: Sequence[tuple[int, ...]], shortest_shared: int | None) -> list[Branch]:
    """Lay sequences out in one row, with what they begin alike standing there once.

    In lexical order a sequence has its longest common beginning with its predecessor, so the tree grows in one walk.

    Args:
        rows: token ids.
        shortest_shared: a common beginning of fewer tokens is not worth sharing; None: nothing is shared, and the
            sequences stand in the row in their own order.

    Returns:
        One branch for each sequence, in the order of ``rows``.
    """
    order = range(len(rows)) if shortest_shared is None else sorted(range(len(rows)), key=rows.__getitem__)
    branches: dict[int, Branch] = {}
    previous: int | None = None
    end_of_row = 0
    for index in order:
        num_shared = 0
        spans: tuple[Span, ...] = ()
        if shortest_shared is not None and previous is not None:
            num_shared = worth_sharing(num_common(rows[previous], rows[index]), shortest_shared)
            spans = _first_tokens(branches[previous].spans, num_shared)
        own = (end_of_row, end_of_row + len(rows[index]) - num_shared)
        branches[index] = Branch((*spans, own) if own[0] < own[1] else spans, num_shared, own)
        previous, end_of_row = index, own[1]
    return [branches[index] for index in range(len(rows))]


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens two sequences have in common."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:  # the first `low` tokens are equal, the first `high` are not
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def worth_sharing(num_tokens: int, shortest_shared: int | None) -> int:
    """Return how many of so many common leading tokens are computed once only: all or none."""
    return num_tokens if shortest_shared is not None and num_tokens >= shortest_shared else 0


def _first_tokens(spans: Sequence[Span], num_tokens: int) -> tuple[Span, ...]:
    pieces = []
    for begin, end in spans:
        if num_tokens <= 0:
            break
        pieces.append((begin, min(end, begin + num_tokens)))
        num_tokens -= end - begin
    return tuple(pieces)
