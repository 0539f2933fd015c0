"""Prefix sharing between token sequences: which sequence computes which tokens, at which indices of the packed batch.

The sequences form a radix tree over token ids; the packed batch holds the tokens of each node once. Pure: lists of ids
in, positions out, no torch. The queue computes the cost of a batch with it, and an engine builds its layout from it.
The tokens of cached prefixes follow the packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

TokenIds: TypeAlias = tuple[int, ...]

TokenSpan: TypeAlias = tuple[int, int]
"""First and one-past-last index in the packed batch."""


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """The indices of one sequence's tokens in the packed batch."""

    spans: tuple[TokenSpan, ...]
    """The spans of the packed batch that hold the whole sequence, in order."""

    num_shared: int
    """Leading tokens that are computed for another sequence or are cached; the rest are the sequence's own."""

    own: TokenSpan
    """The one span of the sequence's own tokens; empty where all are shared."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole sequence."""
        return self.num_shared + self.num_own

    @property
    def num_own(self) -> int:
        """Tokens that are computed for this sequence."""
        return self.own[1] - self.own[0]

    def index_of(self, position: int) -> int:
        """Return the index in the packed batch of the token at this position of the sequence.

        Raises:
            IndexError: the sequence has no token at this position.
        """
        for begin, end in self.spans:
            if position < end - begin:
                return begin + position
            position -= end - begin
        raise IndexError("The sequence has no token at this position")

    def spans_from(self, position: int) -> tuple[TokenSpan, ...]:
        """Return the spans that hold the sequence from this position to its end."""
        return _clip_spans(self.spans, position, self.num_tokens)


def plan_prefix_sharing(
    sequences: Sequence[TokenIds], min_shared_tokens: int | None, cached: Sequence[TokenSpan] | None = None
) -> list[SequenceLayout]:
    """Assign every token of a batch its index in the packed batch, with shared prefixes once.

    In lexicographic order, the sequences with the longest prefix in common with a sequence are adjacent to it, so one
    pass over the sorted sequences finds the radix tree.

    Args:
        sequences: token ids.
        min_shared_tokens: a shorter common prefix is not shared; None: nothing is shared, and the sequences keep their
            order in the packed batch.
        cached: each sequence's prefix that need not be computed, as a span of all cached tokens, which follow the
            packed batch; empty where there is none. None: nothing is cached.

    Returns:
        One layout per sequence, in the order of ``sequences``.
    """
    cached = [(0, 0)] * len(sequences) if cached is None else cached
    num_cached = [end - begin for begin, end in cached]
    order = list(range(len(sequences)))
    owners: dict[int, tuple[int, int]] = {}
    if min_shared_tokens is not None:
        order.sort(key=sequences.__getitem__)
        owners = _find_owners(sequences, order, num_cached, min_shared_tokens)
    num_shared = [max(count, owners.get(index, (0, 0))[1]) for index, count in enumerate(num_cached)]
    num_packed = sum(map(len, sequences)) - sum(num_shared)
    layouts: dict[int, SequenceLayout] = {}
    begin = 0
    for index in sorted(order, key=num_cached.__getitem__):  # an owner has fewer cached tokens, or comes first
        spans: tuple[TokenSpan, ...] = ()
        if num_cached[index]:
            spans = ((num_packed + cached[index][0], num_packed + cached[index][1]),)
        if index in owners:
            owner, num_common = owners[index]
            spans += _clip_spans(layouts[owner].spans, num_cached[index], num_common)
        own = (begin, begin + len(sequences[index]) - num_shared[index])
        layouts[index] = SequenceLayout((*spans, own) if own[0] < own[1] else spans, num_shared[index], own)
        begin = own[1]
    return [layouts[index] for index in range(len(sequences))]


def has_shared_prefix(sequences: Sequence[TokenIds], min_shared_tokens: int | None) -> bool:
    """Return whether ``plan_prefix_sharing`` would share a prefix, without building the tree."""
    if min_shared_tokens is None:
        return False
    prefixes = [tokens[:min_shared_tokens] for tokens in sequences if len(tokens) >= min_shared_tokens]
    return len(set(prefixes)) < len(prefixes)


def _find_owners(
    sequences: Sequence[TokenIds], order: Sequence[int], num_cached: Sequence[int], min_shared_tokens: int
) -> dict[int, tuple[int, int]]:
    """Return, for each sequence that uses tokens computed for another one, that one (its owner) and how many tokens.

    A sequence can use what is computed for one with fewer cached tokens, not the other way round; of sequences with
    equally many the lexicographically first is the owner. So a token that some sequence must compute is computed once.

    Args:
        sequences: token ids.
        order: indices of the sequences in lexicographic order.
        num_cached: leading tokens of each sequence that need not be computed.
        min_shared_tokens: a shorter common prefix is not shared.
    """
    common = [common_prefix_length(sequences[before], sequences[index]) for before, index in pairwise(order)]
    owners: dict[int, tuple[int, int]] = {}
    for rank, index in enumerate(order):
        least = max(num_cached[index] + 1, min_shared_tokens)
        for step, ties in ((-1, 1), (1, 0)):
            num_tokens, other = len(sequences[index]), rank
            while 0 <= other + step < len(order):
                num_tokens = min(num_tokens, common[min(other, other + step)])
                other += step
                if num_tokens < least:
                    break
                if num_cached[order[other]] < num_cached[index] + ties:
                    owners[index] = (order[other], num_tokens)
                    least = num_tokens + 1
                    break
    return owners


def common_prefix_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens two sequences have in common, by bisection on slices, which compare fast."""
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


def shareable_tokens(num_common: int, min_shared_tokens: int | None) -> int:
    """Return how many tokens of a common prefix of this length are shared: all, or none of a short one."""
    return num_common if min_shared_tokens is not None and num_common >= min_shared_tokens else 0


def _clip_spans(spans: Sequence[TokenSpan], first: int, end: int) -> tuple[TokenSpan, ...]:
    """Return the spans of a sequence's tokens from position ``first`` up to ``end``, given the spans of all of them."""
    clipped = []
    for begin, stop in spans:
        part = (begin + max(first, 0), min(stop, begin + end))
        if part[0] < part[1]:
            clipped.append(part)
        first, end = first - (stop - begin), end - (stop - begin)
    return tuple(clipped)
