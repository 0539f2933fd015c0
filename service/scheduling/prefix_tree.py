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

    In lexical order a sequence has its longest common beginnings with its neighbours, so the tree is found in one walk.

    Args:
        rows: token ids.
        shortest_shared: a common beginning of fewer tokens is not worth sharing; None: nothing is shared, and the
            sequences stand in the row in their own order.
        kept: of each row the beginning that need not be computed, as a piece of all such tokens, which stand behind the
            row; empty where there is none. None: there is none.

    Returns:
        One branch for each sequence, in the order of ``rows``.
    """
    kept = [(0, 0)] * len(rows) if kept is None else kept
    depths = [end - begin for begin, end in kept]
    order = list(range(len(rows))) if shortest_shared is None else sorted(range(len(rows)), key=rows.__getitem__)
    owners = {} if shortest_shared is None else _owners(rows, order, depths, shortest_shared)
    num_shared = [max(depth, owners.get(index, (0, 0))[1]) for index, depth in enumerate(depths)]
    end_of_row = sum(map(len, rows)) - sum(num_shared)
    branches: dict[int, Branch] = {}
    begin = 0
    for index in sorted(order, key=depths.__getitem__):
        spans: tuple[Span, ...] = ()
        if depths[index]:
            spans = ((end_of_row + kept[index][0], end_of_row + kept[index][1]),)
        if index in owners:
            owner, num_common_tokens = owners[index]
            spans += _pieces(branches[owner].spans, depths[index], num_common_tokens)
        own = (begin, begin + len(rows[index]) - num_shared[index])
        branches[index] = Branch((*spans, own) if own[0] < own[1] else spans, num_shared[index], own)
        begin = own[1]
    return [branches[index] for index in range(len(rows))]


def _owners(
    rows: Sequence[tuple[int, ...]], order: Sequence[int], depths: Sequence[int], shortest_shared: int
) -> dict[int, tuple[int, int]]:
    """Return for rows that begin with more than is kept of them like another one: which, and how many such tokens.

    What one row has computed the other may use, and not the other way round, where less of it is kept; among equals the
    first in lexical order computes. So every token is computed once, if anyone's is not kept.
    """
    common = [num_common(rows[before], rows[index]) for before, index in pairwise(order)]
    owners: dict[int, tuple[int, int]] = {}
    for place, index in enumerate(order):
        least = max(depths[index] + 1, shortest_shared)
        for step, ties in ((-1, 1), (1, 0)):
            num_tokens, other = len(rows[index]), place
            while 0 <= other + step < len(order):
                num_tokens = min(num_tokens, common[min(other, other + step)])
                other += step
                if num_tokens < least:
                    break
                if depths[order[other]] < depths[index] + ties:
                    owners[index] = (order[other], num_tokens)
                    least = num_tokens + 1
                    break
    return owners


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


def _pieces(spans: Sequence[Span], first: int, end: int) -> tuple[Span, ...]:
    """Return where the tokens of a sequence from ``first`` up to ``end`` stand, given where all of them do."""
    pieces = []
    for begin, stop in spans:
        piece = (begin + max(first, 0), min(stop, begin + end))
        if piece[0] < piece[1]:
            pieces.append(piece)
        first, end = first - (stop - begin), end - (stop - begin)
    return tuple(pieces)
