"""The tree of shared beginnings among token sequences, laid out as one row that holds every shared token once.

Pure: lists of ids in, positions out; no torch. A queue prices a batch by it, and an engine computes what it says. What
an engine has kept of beginnings stands behind the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

Span: TypeAlias = tuple[int, int]
"""First and one-past-last position in the row."""


@dataclass(frozen=True, slots=True)
class Branch:
    """Where one sequence stands in the row.

    ``spans``: the pieces of the row that are its tokens, in order. ``num_shared``: its leading tokens that another
    sequence owns, or that stand behind the row; what remains is its own and stands in one piece, ``own``, which is
    empty where all is shared.
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


def grow_branches(
    rows: Sequence[tuple[int, ...]], shortest_shared: int | None, kept: Sequence[Span] | None = None
) -> list[Branch]:
    """Lay sequences out in one row, with what they begin alike standing there once.

    In lexical order a sequence has its longest common beginning with its predecessor, so the tree grows in one walk.

    Args:
        rows: token ids.
        shortest_shared: a common beginning of fewer tokens is not worth sharing; None: nothing is shared, and the
            sequences stand in the row in their own order.
        kept: of each row the beginning that need not be computed, as a piece of all such tokens, which stand behind the
            row; empty where there is none. Of ``agreed_depths``. None: there is none.

    Returns:
        One branch for each sequence, in the order of ``rows``.
    """
    kept = [(0, 0)] * len(rows) if kept is None else kept
    order = list(range(len(rows))) if shortest_shared is None else _in_lexical_order(rows)
    common = [0, *(_num_shared(rows[before], rows[index], shortest_shared) for before, index in pairwise(order))]
    num_shared = [max(num, kept[index][1] - kept[index][0]) for num, index in zip(common, order, strict=True)]
    end_of_row = sum(map(len, rows)) - sum(num_shared)
    branches: dict[int, Branch] = {}
    spans: tuple[Span, ...] = ()
    begin = 0
    for index, num_before, num in zip(order, common, num_shared, strict=True):
        behind = (end_of_row + kept[index][0], end_of_row + kept[index][1])
        spans = _first_tokens(spans if num_before == num else (behind,), num)
        own = (begin, begin + len(rows[index]) - num)
        spans = (*spans, own) if own[0] < own[1] else spans
        branches[index] = Branch(spans, num, own)
        begin = own[1]
    return [branches[index] for index in range(len(rows))]


def agreed_depths(rows: Sequence[tuple[int, ...]], depths: Sequence[int], shortest_shared: int) -> list[int]:
    """Return how many leading tokens of each row need not be computed, so that rows that begin alike agree.

    A token that one row must have computed, because its state is wanted, is computed for all rows that share it. So the
    tokens of a pass are those of the tree that are left over, and never more.

    Args:
        rows: token ids.
        depths: how many leading tokens each row by itself could do without.
        shortest_shared: rows that begin with fewer equal tokens share nothing.
    """
    agreed = list(depths)
    if not any(agreed):
        return agreed
    order = _in_lexical_order(rows)
    for walk in (order, order[::-1]):
        for before, index in pairwise(walk):
            common = _num_shared(rows[before], rows[index], shortest_shared)
            if agreed[before] < min(agreed[index], common):
                agreed[index] = agreed[before]
    return agreed


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


def _num_shared(first: Sequence[int], second: Sequence[int], shortest_shared: int | None) -> int:
    return 0 if shortest_shared is None else worth_sharing(num_common(first, second), shortest_shared)


def _in_lexical_order(rows: Sequence[tuple[int, ...]]) -> list[int]:
    return sorted(range(len(rows)), key=rows.__getitem__)


def _first_tokens(spans: Sequence[Span], num_tokens: int) -> tuple[Span, ...]:
    pieces = []
    for begin, end in spans:
        if num_tokens <= 0:
            break
        pieces.append((begin, min(end, begin + num_tokens)))
        num_tokens -= end - begin
    return tuple(pieces)
