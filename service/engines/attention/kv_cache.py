"""Keys and values of beginnings, kept between passes so that a prompt is computed once for all its completions.

What stands in a slot, and for how long, is decided in ``prefix_index``. Weights do not change while an engine lives,
so what is kept never goes stale; and only what a whole pass has found finite is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from service.engines.attention.prefix_index import CachedPrefix, PrefixIndex
from service.scheduling.prefix_tree import Branch, Span

MAX_RUNS = 8
"""Runs of neighbouring slots up to which each is written by itself; with more, one copy for all takes less time."""


class KVCache:
    """A bank of keys and values, [slots, key heads, head dimension] for each call of attention in a pass.

    The first pass shows which shapes they have; then the bank is laid out, and from the second one on states are kept.
    On a CPU a slot takes no memory before it is used.

    Args:
        max_bytes: of all tensors together.
        shortest: a beginning of fewer tokens is not kept.
    """

    def __init__(self, max_bytes: int, shortest: int) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.prefixes = PrefixIndex(0, shortest)
        self._max_bytes = max_bytes
        self._shortest = shortest

    @contextmanager
    def visit(self, rows: Sequence[tuple[int, ...]], limits: Sequence[int]) -> Iterator[CacheTransaction]:
        """Look up what is kept of the rows of a pass, which runs while the context is open.

        What the pass adds is forgotten again unless it was confirmed.

        Args:
            rows: of the pass.
            limits: how many leading tokens of each row may be left out of the pass.
        """
        visit = CacheTransaction(self, rows, limits)
        try:
            yield visit
        finally:
            visit.rollback()

    def lay_out(self, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Make the bank for keys and values like those of a pass, each [1, key heads, tokens, head dimension]."""
        shapes = [(states.shape[1], states.shape[3]) for pair in examples for states in pair]
        token_bytes = sum(heads * size * examples[0][0].element_size() for heads, size in shapes)
        num_slots = self._max_bytes // token_bytes
        self.layers = [(_bank_for(key, num_slots), _bank_for(value, num_slots)) for key, value in examples]
        self.prefixes = PrefixIndex(num_slots, self._shortest)


class CacheTransaction:
    """What one pass takes from the bank and leaves there.

    ``spans``: of each row the piece of the taken tokens that is its beginning, empty where nothing is. The taken tokens
    stand behind those of the row.
    """

    def __init__(self, bank: KVCache, rows: Sequence[tuple[int, ...]], limits: Sequence[int]) -> None:
        self._bank = bank
        self._rows = rows
        self._layer = 0
        self._num_row_tokens = 0
        self._added: list[CachedPrefix] = []
        self._examples: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._slots: torch.Tensor
        self._new: _NewTokens | None = None
        bank.prefixes.begin_pass()
        self.spans, self._taken = _take(bank.prefixes, rows, limits)

    @property
    def num_taken(self) -> int:
        """Tokens of all rows that need not be computed in this pass by anyone."""
        return sum(end - begin for begin, end in self.spans)

    def plan(self, branches: Sequence[Branch], prompts: Sequence[int | None], device: torch.device) -> None:
        """Decide what the pass leaves in the bank: prompts, and where their end is unknown what rows begin alike.

        Args:
            branches: where the rows stand.
            prompts: how many leading tokens of each row are its prompt; None where that is unknown.
            device: of the model.
        """
        self._num_row_tokens = sum(branch.num_own for branch in branches)
        self._slots = torch.from_numpy(self._taken).to(device)
        if not self._bank.layers:
            return
        sources, targets = [], []
        for row, branch, prompt in zip(self._rows, branches, prompts, strict=True):
            added = self._bank.prefixes.add(row[: branch.num_shared if prompt is None else prompt])
            if added is not None:
                prefix, num_known = added
                self._added.append(prefix)
                targets.append(prefix.slots[num_known:])
                sources.append(_positions(branch, num_known, len(prefix.tokens)))
        if self._added:
            self._new = _NewTokens(np.concatenate(sources), np.concatenate(targets), device)

    def extended(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values of the row with those of the taken tokens behind it, and keep what is new.

        Called once by each layer of the pass, in their order; [1, key heads, tokens, head dimension] in and out.
        """
        layer, self._layer = self._layer, self._layer + 1
        if not self._bank.layers:
            self._examples.append((key[:, :, :0].clone(), value[:, :, :0].clone()))
            return key, value
        banks = self._bank.layers[layer]
        if len(self._taken):
            key, value = (self._append(states, bank) for states, bank in zip((key, value), banks, strict=True))
        if self._new is not None:
            for states, bank in zip((key, value), banks, strict=True):
                self._new.copy(_by_token(states), bank)
        return key, value

    def confirm(self) -> None:
        """Keep what the pass has left, if all of it is finite: the rewards of the pass were."""
        if not self._bank.layers:
            self._bank.lay_out(self._examples)
        elif self._layer == len(self._bank.layers) and self._is_finite():
            self._added = []

    def rollback(self) -> None:
        """Forget what the pass has left and nobody confirmed."""
        for prefix in self._added:
            self._bank.prefixes.remove(prefix)
        self._added = []
        self._examples = []

    def _append(self, states: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        row = _by_token(states)[: self._num_row_tokens]
        return torch.cat([row, bank.index_select(0, self._slots)]).transpose(0, 1).unsqueeze(0)

    def _is_finite(self) -> bool:
        """Whether all keys and values left in the last layer are finite, which they are only if all before them were.

        One that is not makes their sum so.
        """
        if self._new is None:
            return True
        slots = self._new.targets
        sums = [bank.index_select(0, slots).sum(dtype=torch.float32) for bank in self._bank.layers[-1]]
        return bool(torch.stack(sums).isfinite().all())


class _NewTokens:
    """Where the tokens stand that a pass leaves in the bank, and the slots they go to."""

    def __init__(self, sources: NDArray[np.int64], targets: NDArray[np.int64], device: torch.device) -> None:
        self.targets = torch.from_numpy(targets).to(device)
        self._sources = torch.from_numpy(sources).to(device)
        borders = [0, *(np.flatnonzero(np.diff(targets) != 1) + 1).tolist(), len(targets)]
        self._runs = [(begin, end, int(targets[begin])) for begin, end in pairwise(borders)]

    def copy(self, states: torch.Tensor, bank: torch.Tensor) -> None:
        """Copy states, [positions, heads, head dimension], into the slots of a bank."""
        if len(self._runs) > MAX_RUNS:
            bank.index_copy_(0, self.targets, states.index_select(0, self._sources))
            return
        for begin, end, slot in self._runs:
            torch.index_select(states, 0, self._sources[begin:end], out=bank[slot : slot + end - begin])


def _take(
    prefixes: PrefixIndex, rows: Sequence[tuple[int, ...]], limits: Sequence[int]
) -> tuple[list[Span], NDArray[np.int64]]:
    """Find what is kept of rows; return each one's piece of the taken tokens, and the slots of those.

    Rows that found the same beginning have one piece in common.
    """
    found = [prefixes.longest(row, limit) for row, limit in zip(rows, limits, strict=True)]
    lengths: dict[CachedPrefix, int] = {}
    for prefix, depth in found:
        if prefix is not None:
            prefixes.use(prefix)
            lengths[prefix] = max(depth, lengths.get(prefix, 0))
    begins = dict(zip(lengths, accumulate(lengths.values(), initial=0), strict=False))
    spans = [(0, 0) if prefix is None else (begins[prefix], begins[prefix] + depth) for prefix, depth in found]
    slots = [prefix.slots[:length] for prefix, length in lengths.items()]
    return spans, np.concatenate([np.empty(0, np.int64), *slots])


def _positions(branch: Branch, first: int, end: int) -> NDArray[np.int64]:
    """Return where the tokens of a sequence from ``first`` up to ``end`` stand."""
    pieces = [np.arange(*span) for span in branch.spans_from(first)]
    return np.concatenate(pieces)[: end - first]


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """Return [tokens, heads, head dimension] of [1, heads, tokens, head dimension]."""
    return states[0].transpose(0, 1)


def _bank_for(states: torch.Tensor, num_slots: int) -> torch.Tensor:
    return states.new_empty(num_slots, states.shape[1], states.shape[3])
