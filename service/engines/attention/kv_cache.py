"""The prefix cache: keys and values of prefixes, cached between passes so that a prompt is computed once.

``prefix_index`` decides which tokens are in which slots, and when they are evicted. Weights do not change while an
engine lives, so cached states never become stale; and a prefix is cached only after its pass has ended with finite
results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from service.engines.attention.prefix_index import CachedPrefix, PrefixIndex
from service.scheduling.prefix_tree import SequenceLayout, TokenIds, TokenSpan

MAX_COPIED_RUNS = 8
"""Up to this many runs of contiguous slots, each run is written separately; with more, one indexed copy is faster."""


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """The cached tokens of the sequences of a pass: the result of a lookup."""

    spans: tuple[TokenSpan, ...]
    """The cached prefix of each sequence, as a span of all cached tokens of the pass; empty where nothing is cached."""

    slots: NDArray[np.int64]
    """The slot of each cached token of the pass. Sequences that found the same prefix share its tokens."""

    @property
    def num_saved(self) -> int:
        """Tokens of all sequences that no sequence of the pass has to compute."""
        return sum(end - begin for begin, end in self.spans)


class KVCache:
    """A pool of keys and values, [slots, key heads, head dimension] for each attention layer of the model.

    A pass calls ``lookup``, builds its layout with the cached tokens found, and runs within ``begin``. The shapes of
    the states are known after the first pass: its commit allocates the pool, and states are cached from the second pass
    on. On a CPU a slot occupies no memory before it is used.

    Args:
        max_bytes: memory limit of all tensors together.
        min_tokens: a shorter prefix is not cached.
    """

    def __init__(self, max_bytes: int, min_tokens: int) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.prefix_index = PrefixIndex(0, min_tokens)
        self._max_bytes = max_bytes
        self._min_tokens = min_tokens

    def lookup(self, sequences: Sequence[TokenIds], limits: Sequence[int]) -> CachedTokens:
        """Begin a pass: find the cached prefixes of its sequences, which are not evicted before the next pass begins.

        Args:
            sequences: token ids of the pass.
            limits: how many leading tokens of each sequence may be taken from the cache.
        """
        index = self.prefix_index
        index.begin_pass()
        found = [index.longest(tokens, limit) for tokens, limit in zip(sequences, limits, strict=True)]
        index.end_lookups()
        lengths: dict[CachedPrefix, int] = {}
        for prefix, length in found:
            if prefix is not None:
                index.use(prefix)
                lengths[prefix] = max(length, lengths.get(prefix, 0))
        begins = dict(zip(lengths, accumulate(lengths.values(), initial=0), strict=False))
        spans = [(0, 0) if prefix is None else (begins[prefix], begins[prefix] + length) for prefix, length in found]
        slots = [prefix.slots[:length] for prefix, length in lengths.items()]
        return CachedTokens(tuple(spans), np.concatenate([np.empty(0, np.int64), *slots]))

    @contextmanager
    def begin(
        self,
        cached: CachedTokens,
        sequences: Sequence[TokenIds],
        layouts: Sequence[SequenceLayout],
        prompts: Sequence[int | None],
        device: torch.device,
    ) -> Iterator[CacheTransaction]:
        """Reserve slots for the pass's prompts, or for its shared prefixes where the end of a prompt is unknown.

        The pass runs while the context is open. The prefixes that it added are removed again unless the transaction was
        committed.

        Args:
            cached: the result of the lookup for this pass.
            sequences: token ids of the pass.
            layouts: the layout of each sequence, with its cached tokens.
            prompts: how many leading tokens of each sequence are its prompt; None where that is unknown.
            device: the device of the model.
        """
        added: list[CachedPrefix] = []
        transaction: CacheTransaction | None = None
        try:
            new_tokens = self._reserve(sequences, layouts, prompts, device, added)
            slots = torch.from_numpy(cached.slots).to(device)
            num_packed = sum(layout.num_own for layout in layouts)
            transaction = CacheTransaction(self, slots, num_packed, new_tokens)
            yield transaction
        finally:
            if transaction is None or not transaction.is_committed:
                self._rollback(added)

    def _reserve(
        self,
        sequences: Sequence[TokenIds],
        layouts: Sequence[SequenceLayout],
        prompts: Sequence[int | None],
        device: torch.device,
        added: list[CachedPrefix],
    ) -> _NewTokens | None:
        """Add the prefixes of a pass to the index and to ``added``; return the tokens to copy, if any."""
        if not self.layers:
            return None
        sources, targets = [], []
        for tokens, layout, prompt in zip(sequences, layouts, prompts, strict=True):
            reserved = self.prefix_index.add(tokens[: layout.num_shared if prompt is None else prompt])
            if reserved is not None:
                prefix, num_known = reserved
                added.append(prefix)
                targets.append(prefix.slots[num_known:])
                sources.append(_indices(layout, num_known, len(prefix.tokens)))
        return _NewTokens(np.concatenate(sources), np.concatenate(targets), device) if added else None

    def _rollback(self, added: Sequence[CachedPrefix]) -> None:
        for prefix in added:
            self.prefix_index.remove(prefix)

    def allocate(self, examples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Allocate the pool for keys and values like those of a pass, each [1, key heads, tokens, head dimension]."""
        shapes = [(states.shape[1], states.shape[3]) for pair in examples for states in pair]
        token_bytes = sum(heads * size * examples[0][0].element_size() for heads, size in shapes)
        num_slots = self._max_bytes // token_bytes
        self.layers = [(_pool_for(key, num_slots), _pool_for(value, num_slots)) for key, value in examples]
        self.prefix_index = PrefixIndex(num_slots, self._min_tokens)


class CacheTransaction:
    """What one pass reads from the pool and writes to it; created by ``KVCache.begin``.

    Each attention layer calls ``append`` once, in the order of the layers; then the pass calls ``commit``, or leaves
    the context without it, which rolls back.

    Args:
        cache: the cache to read and write.
        slots: the slots of the cached tokens, int64 on the device.
        num_packed: tokens of the packed batch without padding.
        new_tokens: the tokens to write; None: none.
    """

    def __init__(self, cache: KVCache, slots: torch.Tensor, num_packed: int, new_tokens: _NewTokens | None) -> None:
        self.is_committed = False
        self._cache = cache
        self._slots = slots
        self._num_packed = num_packed
        self._new_tokens = new_tokens
        self._num_layers_seen = 0
        self._examples: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values, followed by the cached ones, and write the new ones to the pool.

        Called once by each layer of the pass, in their order; [1, key heads, tokens, head dimension] in and out.
        """
        layer, self._num_layers_seen = self._num_layers_seen, self._num_layers_seen + 1
        if not self._cache.layers:
            self._examples.append((key[:, :, :0].clone(), value[:, :, :0].clone()))
            return key, value
        key_pool, value_pool = self._cache.layers[layer]
        if len(self._slots):
            key, value = self._with_cached(key, key_pool), self._with_cached(value, value_pool)
        if self._new_tokens is not None:
            self._new_tokens.copy(_by_token(key), key_pool)
            self._new_tokens.copy(_by_token(value), value_pool)
        return key, value

    def commit(self) -> None:
        """Cache what the pass has written if all of it is finite; called if the rewards of the pass are finite.

        The commit of the first pass allocates the pool instead.
        """
        if not self._cache.layers:
            self._cache.allocate(self._examples)
        elif self._num_layers_seen == len(self._cache.layers) and self._is_finite():
            self.is_committed = True

    def _with_cached(self, states: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        packed = _by_token(states)[: self._num_packed]
        return torch.cat([packed, pool.index_select(0, self._slots)]).transpose(0, 1).unsqueeze(0)

    def _is_finite(self) -> bool:
        """Whether all new keys and values of the last layer are finite, which requires that all before them are.

        A single state that is not finite makes their sum not finite.
        """
        if self._new_tokens is None:
            return True
        slots = self._new_tokens.targets
        sums = [pool.index_select(0, slots).sum(dtype=torch.float32) for pool in self._cache.layers[-1]]
        return bool(torch.stack(sums).isfinite().all())


class _NewTokens:
    """The tokens that a pass writes to the pool: their indices in the keys and values, and their slots."""

    def __init__(self, sources: NDArray[np.int64], targets: NDArray[np.int64], device: torch.device) -> None:
        self.targets = torch.from_numpy(targets).to(device)
        self._sources = torch.from_numpy(sources).to(device)
        run_begins = [0, *(np.flatnonzero(np.diff(targets) != 1) + 1).tolist(), len(targets)]
        self._runs = [(begin, end, int(targets[begin])) for begin, end in pairwise(run_begins)]

    def copy(self, states: torch.Tensor, pool: torch.Tensor) -> None:
        """Copy states, [tokens, heads, head dimension], into the slots of a pool."""
        if len(self._runs) > MAX_COPIED_RUNS:
            pool.index_copy_(0, self.targets, states.index_select(0, self._sources))
            return
        for begin, end, slot in self._runs:
            torch.index_select(states, 0, self._sources[begin:end], out=pool[slot : slot + end - begin])


def _indices(layout: SequenceLayout, first: int, end: int) -> NDArray[np.int64]:
    """Return the indices of a sequence's tokens from position ``first`` up to ``end``."""
    spans = [np.arange(*span) for span in layout.spans_from(first)]
    return np.concatenate(spans)[: end - first]


def _by_token(states: torch.Tensor) -> torch.Tensor:
    """Return [tokens, heads, head dimension] of [1, heads, tokens, head dimension]."""
    return states[0].transpose(0, 1)


def _pool_for(states: torch.Tensor, num_slots: int) -> torch.Tensor:
    return states.new_empty(num_slots, states.shape[1], states.shape[3])
