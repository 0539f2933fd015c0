"""Which prefixes are cached between passes, and in which slots of the pool their tokens are: the index of ``kv_cache``.

Pure: token ids and slot numbers, no states and no torch. A slot holds one token of one prefix. Prefixes that have
leading tokens in common share the slots of those tokens, which are reference-counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.scheduling.prefix_tree import TokenIds, common_prefix_length, shareable_tokens

SEARCH_SLOTS = 1024
"""Number of slots that one step of the search for free slots covers."""


@dataclass(slots=True, eq=False)
class CachedPrefix:
    """A cached prefix."""

    tokens: TokenIds = field(repr=False)

    slots: NDArray[np.int64] = field(repr=False)
    """The slot of each token."""

    last_pass: int
    """Number of the last pass that used it."""


_Match: TypeAlias = tuple[CachedPrefix, int]
"""A cached prefix, and how many leading tokens it has in common with a sequence."""


class PrefixIndex:
    """Prefixes in a fixed number of slots; the least recently used one is evicted when a new one needs its slots.

    Args:
        num_slots: tokens that can be cached.
        min_tokens: a shorter prefix is neither cached nor found.
    """

    def __init__(self, num_slots: int, min_tokens: int) -> None:
        self._min_tokens = min_tokens
        self._use_counts = np.zeros(num_slots, np.int32)
        self._num_free = num_slots
        self._next_slot = 0  # start of the cyclic search for free slots: contiguous slots are copied fastest
        self._sorted: list[CachedPrefix] = []  # in lexicographic order
        self._by_age: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._pass = 0
        # Results of lookups by the identity of the token ids, which are stored too, so that no other tuple gets it.
        self._matches: dict[int, tuple[TokenIds, list[_Match]]] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def num_tokens(self) -> int:
        """Slots in use."""
        return len(self._use_counts) - self._num_free

    def begin_pass(self) -> None:
        """Count a new pass. What is used or added from now on is not evicted until the next one begins."""
        self._pass += 1

    def longest(self, tokens: TokenIds, limit: int) -> tuple[CachedPrefix | None, int]:
        """Return the cached prefix with the longest common prefix with a sequence, and its length, at most ``limit``.

        The comparison is stored for this tuple object until a prefix is added or removed, or ``end_lookups`` is called:
        the queue looks a sequence up to compute its cost, and the pass that computes the sequence looks it up again.
        """
        known = self._matches.get(id(tokens))
        if known is None:
            known = self._matches[id(tokens)] = tokens, self._adjacent(tokens)
        return self._longest_of(known[1], limit)

    def end_lookups(self) -> None:
        """Drop the stored results of lookups; called by each pass, so that no finished request is referenced."""
        self._matches.clear()

    def use(self, prefix: CachedPrefix) -> None:
        """Mark a prefix as used by the current pass."""
        prefix.last_pass = self._pass
        self._by_age.move_to_end(prefix)

    def add(self, tokens: TokenIds) -> tuple[CachedPrefix, int] | None:
        """Reserve slots for a prefix; return it with how many of its leading tokens were cached already.

        None where it is too short, is already cached completely, or would need slots that this pass uses.
        """
        if not shareable_tokens(len(tokens), self._min_tokens):
            return None
        known, num_known = self._longest_of(self._adjacent(tokens), len(tokens))
        if known is not None:
            self.use(known)
        if num_known == len(tokens) or not self._evict_until_free(len(tokens) - num_known):
            return None
        shared_slots = np.empty(0, np.int64) if known is None else known.slots[:num_known]
        slots = np.concatenate([shared_slots, self._take_slots(len(tokens) - num_known)])
        prefix = CachedPrefix(tokens, slots, self._pass)
        self._use_counts[prefix.slots] += 1
        self._sorted.insert(self._rank(tokens), prefix)
        self._by_age[prefix] = None
        self._matches.clear()
        return prefix, num_known

    def remove(self, prefix: CachedPrefix) -> None:
        """Remove a prefix; slots that no other prefix uses become free."""
        del self._sorted[self._rank(prefix.tokens)]
        del self._by_age[prefix]
        self._use_counts[prefix.slots] -= 1
        self._num_free += int((self._use_counts[prefix.slots] == 0).sum())
        self._matches.clear()

    def clear(self) -> None:
        """Remove all prefixes."""
        for prefix in list(self._sorted):
            self.remove(prefix)
        self._next_slot = 0
        self._matches.clear()

    def _rank(self, tokens: TokenIds) -> int:
        return bisect_left(self._sorted, tokens, key=_tokens_of)

    def _adjacent(self, tokens: TokenIds) -> list[_Match]:
        """Compare a sequence with the prefixes adjacent to it in lexicographic order; one is the longest match."""
        rank = self._rank(tokens)
        return [
            (prefix, common_prefix_length(prefix.tokens, tokens))
            for prefix in self._sorted[max(rank - 1, 0) : rank + 1]
        ]

    def _longest_of(self, matches: list[_Match], limit: int) -> tuple[CachedPrefix | None, int]:
        found: CachedPrefix | None = None
        num_common = 0
        for prefix, common in matches:
            if min(common, limit) > num_common:
                found, num_common = prefix, min(common, limit)
        return (found, num_common) if shareable_tokens(num_common, self._min_tokens) else (None, 0)

    def _evict_until_free(self, num_slots: int) -> bool:
        """Free this many slots; return whether that was possible without evicting prefixes that this pass uses."""
        if num_slots > len(self._use_counts):
            return False
        while self._num_free < num_slots:
            oldest = next(iter(self._by_age))
            if oldest.last_pass == self._pass:
                return False
            self.remove(oldest)
        return True

    def _take_slots(self, num_slots: int) -> NDArray[np.int64]:
        self._num_free -= num_slots
        taken = [np.empty(0, np.int64)]
        while num_slots:
            searched = self._use_counts[self._next_slot : self._next_slot + SEARCH_SLOTS]
            free = np.flatnonzero(searched == 0)[:num_slots]
            taken.append(free + self._next_slot)
            num_slots -= len(free)
            self._next_slot += len(searched) if num_slots else int(free[-1]) + 1
            self._next_slot %= len(self._use_counts)
        return np.concatenate(taken)


def _tokens_of(prefix: CachedPrefix) -> TokenIds:
    return prefix.tokens
