"""Which beginnings are kept between passes, and in which slots their tokens lie: the books of ``kv_cache``.

Pure: token ids and slot numbers, no states and no torch. A slot holds one token of one beginning. Beginnings that begin
alike have the slots of their common part in common, counted by how many beginnings use each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.scheduling.prefix_tree import num_common, worth_sharing

STRIDE = 1024
"""Slots that are looked at together for free ones."""


@dataclass(slots=True, eq=False)
class CachedPrefix:
    """A beginning that is kept: its tokens, and the slot of each.

    ``last_pass``: number of the pass that used it last.
    """

    tokens: tuple[int, ...] = field(repr=False)
    slots: NDArray[np.int64] = field(repr=False)
    last_pass: int


class PrefixIndex:
    """Beginnings within a fixed number of slots; the one that was not used for longest makes room for a new one.

    Args:
        num_slots: tokens that can be kept.
        shortest: a beginning of fewer tokens is neither kept nor found.
    """

    def __init__(self, num_slots: int, shortest: int) -> None:
        self._shortest = shortest
        self._uses = np.zeros(num_slots, np.int32)
        self._num_free = num_slots
        self._next = 0  # where free slots are looked for, round and round: neighbours are copied fastest
        self._sorted: list[CachedPrefix] = []
        self._by_age: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._pass = 0

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def num_tokens(self) -> int:
        """Slots in use."""
        return len(self._uses) - self._num_free

    def begin_pass(self) -> None:
        """Count a new pass. What is found or added from now on stays until the next one begins."""
        self._pass += 1

    def longest(self, row: tuple[int, ...], limit: int) -> tuple[CachedPrefix | None, int]:
        """Return a kept beginning that has most leading tokens in common with a row, and how many, at most ``limit``.

        In lexical order it stands beside the row.
        """
        place = bisect_left(self._sorted, row, key=_tokens_of)
        found: CachedPrefix | None = None
        depth = 0
        for neighbour in self._sorted[max(place - 1, 0) : place + 1]:
            common = min(num_common(neighbour.tokens, row), limit)
            if common > depth:
                found, depth = neighbour, common
        return (found, depth) if worth_sharing(depth, self._shortest) else (None, 0)

    def use(self, prefix: CachedPrefix) -> None:
        """Note that the pass uses it."""
        prefix.last_pass = self._pass
        self._by_age.move_to_end(prefix)

    def add(self, tokens: tuple[int, ...]) -> tuple[CachedPrefix, int] | None:
        """Keep a beginning, and return it with how many of its leading tokens were kept already.

        None where it is too short, is kept whole already, or finds no room beside what this pass uses.
        """
        if not worth_sharing(len(tokens), self._shortest):
            return None
        known, depth = self.longest(tokens, len(tokens))
        if known is not None:
            self.use(known)
        if depth == len(tokens) or not self._make_room(len(tokens) - depth):
            return None
        old = np.empty(0, np.int64) if known is None else known.slots[:depth]
        prefix = CachedPrefix(tokens, np.concatenate([old, self._take(len(tokens) - depth)]), self._pass)
        self._uses[prefix.slots] += 1
        self._sorted.insert(bisect_left(self._sorted, tokens, key=_tokens_of), prefix)
        self._by_age[prefix] = None
        return prefix, depth

    def remove(self, prefix: CachedPrefix) -> None:
        """Forget a beginning; slots that no other one uses are free."""
        del self._sorted[bisect_left(self._sorted, prefix.tokens, key=_tokens_of)]
        del self._by_age[prefix]
        self._uses[prefix.slots] -= 1
        self._num_free += int((self._uses[prefix.slots] == 0).sum())

    def clear(self) -> None:
        """Forget all beginnings."""
        for prefix in list(self._sorted):
            self.remove(prefix)
        self._next = 0

    def _make_room(self, num_slots: int) -> bool:
        if num_slots > len(self._uses):
            return False
        while self._num_free < num_slots:
            oldest = next(iter(self._by_age))
            if oldest.last_pass == self._pass:
                return False
            self.remove(oldest)
        return True

    def _take(self, num_slots: int) -> NDArray[np.int64]:
        self._num_free -= num_slots
        taken = [np.empty(0, np.int64)]
        while num_slots:
            looked_at = self._uses[self._next : self._next + STRIDE]
            free = np.flatnonzero(looked_at == 0)[:num_slots]
            taken.append(free + self._next)
            num_slots -= len(free)
            self._next += len(looked_at) if num_slots else int(free[-1]) + 1
            self._next %= len(self._uses)
        return np.concatenate(taken)


def _tokens_of(prefix: CachedPrefix) -> tuple[int, ...]:
    return prefix.tokens
