"""Chooses the entries of a packed batch: whole prefix groups, in order of fairness.

The cost of a pass is the number of tokens that it computes: a prefix that its sequences share counts once where the
engine shares it, and cached tokens do not count. The cost may be too high, where unrelated sequences happen to share a
prefix, and is never too low, because memory is planned by it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from service.records import TokenSequence
from service.scheduling.budget import BatchBudget
from service.scheduling.flows import Entry, Flow, FlowTable, PrefixGroup, num_shared_tokens

MAX_UNFIT_FLOWS = 8
"""A batch is closed after this many requests whose next group did not fit; limits the search, not the fairness."""

NumCachedTokens: TypeAlias = Callable[[TokenSequence], int]
"""Returns how many leading tokens of a sequence the next pass need not compute."""


def nothing_cached(_sequence: TokenSequence) -> int:
    """Return zero: every pass computes all of its tokens."""
    return 0


@dataclass(frozen=True, slots=True)
class _Selection:
    """Entries of one group that are taken together, in order."""

    entries: tuple[Entry, ...] = ()

    cost: int = 0
    """Tokens that a pass computes for them."""

    last_cached: int = 0
    """Leading tokens of the last entry that the pass need not compute."""


@dataclass(slots=True)
class _Capacity:
    """What a batch can still hold."""

    tokens: int
    sequences: int

    def fits(self, num_tokens: int, num_sequences: int) -> bool:
        return num_tokens <= self.tokens and num_sequences <= self.sequences

    def subtract(self, selection: _Selection) -> None:
        self.tokens -= selection.cost
        self.sequences -= len(selection.entries)

    def limited_to(self, other: _Capacity) -> _Capacity:
        return _Capacity(min(self.tokens, other.tokens), min(self.sequences, other.sequences))


@dataclass(slots=True)
class PackedBatchBuilder:
    """A packed batch that is being filled.

    Entries of the prefix that the fair order chose are taken from other requests too, because in the same pass their
    prompt is computed once. They get at most half of the budget; the rest is filled in order of fairness.
    """

    flows: FlowTable
    budget: BatchBudget

    min_shared_prefix_tokens: int | None
    """Common prefixes of at least this many tokens are computed once in a pass; None: prefixes are not shared."""

    num_cached_tokens: NumCachedTokens = nothing_cached

    _entries: list[Entry] = field(init=False, default_factory=list)
    _capacity: _Capacity = field(init=False)

    _same_prefix_capacity: _Capacity = field(init=False)
    """Remaining capacity for entries that are taken out of order because of their prefix."""

    _last_cached: int = field(init=False, default=0)
    """Leading tokens of the last entry that the pass need not compute."""

    def __post_init__(self) -> None:
        """Start empty, with the capacity of the budget."""
        max_tokens, max_sequences = self.budget.max_tokens, self.budget.max_sequences
        self._capacity = _Capacity(max_tokens, max_sequences)
        self._same_prefix_capacity = _Capacity(max_tokens // 2, max_sequences // 2)

    def fill(self, now: float, expired: list[Entry]) -> list[Entry]:
        """Take a batch out of the flows and return it; expired entries are appended to ``expired``."""
        unfit: list[Flow] = []
        for flow in self.flows.by_priority(now, expired):
            group = flow.first_group
            selection = self._select(group, self._capacity)
            if selection.entries:
                self._take(flow, selection)
                self._add_same_prefix(group.prefix, flow, now)
            else:
                unfit.append(flow)
            if not self._capacity.fits(1, 1) or len(unfit) == MAX_UNFIT_FLOWS:
                break
        self.flows.requeue(unfit)
        return self._entries

    def _take(self, flow: Flow, selection: _Selection) -> None:
        self.flows.serve(flow, selection.entries, selection.cost)
        self._capacity.subtract(selection)
        self._entries += selection.entries
        self._last_cached = selection.last_cached

    def _add_same_prefix(self, prefix: Hashable, flow: Flow, now: float) -> None:
        """Take entries of the same prefix from other flows, unless these flows would delay the one to be finished."""
        if self.flows.finishes_one_by_one or not self._capacity.limited_to(self._same_prefix_capacity).fits(1, 1):
            return
        for other in list(islice(self.flows.with_prefix(prefix), self.budget.max_sequences)):
            if other is flow or other.deadline <= now:
                continue
            capacity = self._capacity.limited_to(self._same_prefix_capacity)
            selection = self._select(other.groups[prefix], capacity)
            if not selection.entries:
                break
            self._take(other, selection)
            self._same_prefix_capacity.subtract(selection)

    def _select(self, group: PrefixGroup, capacity: _Capacity) -> _Selection:
        """Choose the entries of a group for this batch, in order.

        All of them where they fit; none where they do not, but a later batch could hold the whole group; else as many
        as fit. An empty batch takes as many as fit in any case, since no later batch has more capacity. The first one
        shares tokens with the last entry of the batch so far, the others with the one before them. A single entry that
        exceeds the budget is chosen where the batch is empty.
        """
        entries: list[Entry] = []
        cost, before_cached = 0, self._last_cached
        for entry in group.entries.values():
            cached = self.num_cached_tokens(entry.sequence)
            own = entry.num_tokens - self._num_saved(entry, cached, (entries or self._entries)[-1:], before_cached)
            if not capacity.fits(cost + own, len(entries) + 1) and (self._entries or entries):
                break
            entries.append(entry)
            cost, before_cached = cost + own, cached
        fits_later = group.cost <= self.budget.max_tokens and len(group.entries) <= self.budget.max_sequences
        if self._entries and len(entries) < len(group.entries) and fits_later:
            return _Selection()
        return _Selection(tuple(entries), cost, before_cached)

    def _num_saved(self, entry: Entry, cached: int, before: Sequence[Entry], before_cached: int) -> int:
        """Return how many tokens of an entry a pass need not compute, given the entry before it, if there is one.

        Tokens that are taken from the cache for the entry before, but cannot be for this entry, are computed for this
        entry.
        """
        if not before:
            return cached
        if before[0].request == entry.request and before[0].prefix == entry.prefix:
            shared = entry.num_shared
        else:
            shared = num_shared_tokens(before[0].sequence, entry.sequence, self.min_shared_prefix_tokens)
        return max(cached, shared - max(0, min(before_cached, shared) - cached))
