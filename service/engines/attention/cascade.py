"""Attention to a shared beginning once for all that share it, merged with each sequence's attention to its own tokens.

A softmax over all keys is a weighted mean of one over the first and one over the rest; the weights follow from the
log-sum-exp of both. So the beginning's keys need not be gathered for every sequence. What is asked of which keys is
laid out in pure code; the attention itself is ``varlen``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from service.engines.attention.varlen import Borders, attend_varlen
from service.scheduling.prefix_tree import Branch, Span


@dataclass(frozen=True, slots=True)
class PrefixSlab:
    """Some beginnings and all the tokens that come behind them.

    ``places``: int64, where those tokens stand in the row, beginning by beginning. ``keys``: int64, where the tokens of
    the beginnings stand. ``borders``: of the beginnings among both.
    """

    places: torch.Tensor
    keys: torch.Tensor
    borders: Borders


@dataclass(frozen=True, slots=True)
class CascadePlan:
    """The attention of a row in two parts.

    ``own``: borders of the sequences' own tokens. ``longest``: tokens of the longest sequence.
    """

    own: Borders
    prefixes: tuple[PrefixSlab, ...]
    longest: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that attention reads on the device."""
        chunks = [(chunk.places, chunk.keys, chunk.borders.queries, chunk.borders.keys) for chunk in self.prefixes]
        return [self.own.queries, *(tensor for chunk in chunks for tensor in chunk)]

    def moved(self, tensors: Iterator[torch.Tensor]) -> CascadePlan:
        """Return the same plan with its tensors, in their order, replaced."""
        borders = next(tensors)
        own = Borders(borders, borders, self.own.max_seqlen_q, self.own.max_seqlen_k)
        chunks = []
        for chunk in self.prefixes:
            places, keys, queries, seen = (next(tensors) for _ in range(4))
            chunks.append(
                PrefixSlab(places, keys, Borders(queries, seen, chunk.borders.max_seqlen_q, chunk.borders.max_seqlen_k))
            )
        return CascadePlan(own, tuple(chunks), self.longest)

    def holds_for(self, window: int | None) -> bool:
        """Whether all of a beginning is seen by all behind it, as a window may prevent."""
        return window is None or self.longest <= window


def plan_cascade(branches: Sequence[Branch]) -> CascadePlan:
    """Lay out the attention of the sequences of a row without filling, on the CPU."""
    owners = sorted((branch for branch in branches if branch.num_own), key=lambda branch: branch.own)
    own = _borders([branch.num_own for branch in owners], [branch.num_own for branch in owners])
    groups: dict[tuple[Span, ...], list[Branch]] = {}
    for branch in owners:
        if branch.num_shared:
            groups.setdefault(branch.spans[:-1], []).append(branch)
    chunks = tuple(_chunk_of(part) for part in _cut(groups, room=owners[-1].own[1]))
    return CascadePlan(own, chunks, max(branch.num_tokens for branch in branches))


def _cut(
    groups: dict[tuple[Span, ...], list[Branch]], room: int
) -> Iterator[list[tuple[tuple[Span, ...], list[Branch]]]]:
    """Share the beginnings out so that no more keys are gathered at once than the row has, or one beginning."""
    part: list[tuple[tuple[Span, ...], list[Branch]]] = []
    num_keys = 0
    for spans, branches in groups.items():
        num_keys += _length(spans)
        if part and num_keys > room:
            yield part
            part, num_keys = [], _length(spans)
        part.append((spans, branches))
    if part:
        yield part


def _chunk_of(part: Sequence[tuple[tuple[Span, ...], list[Branch]]]) -> PrefixSlab:
    return PrefixSlab(
        _positions([branch.own for _, branches in part for branch in branches]),
        _positions([span for spans, _ in part for span in spans]),
        _borders(
            [sum(branch.num_own for branch in branches) for _, branches in part], [_length(spans) for spans, _ in part]
        ),
    )


def _borders(queries: Sequence[int], keys: Sequence[int]) -> Borders:
    return Borders(_begins(queries), _begins(keys), max(queries), max(keys))


def _begins(counts: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32)


def _positions(spans: Sequence[Span]) -> torch.Tensor:
    return torch.cat([torch.arange(begin, end) for begin, end in spans])


def _length(spans: Sequence[Span]) -> int:
    return sum(end - begin for begin, end in spans)


def attend_cascade(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: CascadePlan,
    *,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend within each sequence of a row by the plan, which must hold for the window.

    Args:
        query: [tokens, heads, head dimension].
        key: [tokens, key heads, head dimension].
        value: as ``key``.
        plan: with its tensors on the device.
        scaling: as of ``attend_varlen``.
        window: as of ``attend_varlen``.

    Returns:
        [tokens, heads, head dimension].
    """
    output, weight = attend_varlen(query, key, value, plan.own, scaling=scaling, window=window)
    for chunk in plan.prefixes:
        asking = query.index_select(0, chunk.places)
        seen, read = (states.index_select(0, chunk.keys) for states in (key, value))
        found, its_weight = attend_varlen(asking, seen, read, chunk.borders, scaling=scaling, causal=False)
        own, own_weight = output.index_select(0, chunk.places), weight.index_select(1, chunk.places)
        output.index_copy_(0, chunk.places, merge(own, own_weight, found, its_weight))
    return output


def merge(one: torch.Tensor, one_weight: torch.Tensor, other: torch.Tensor, other_weight: torch.Tensor) -> torch.Tensor:
    """Return the attention to two sets of keys together, from that to each (Milakov and Gimelshein, 2018).

    Args:
        one: [queries, heads, head dimension].
        one_weight: log-sum-exp of its scores, float32 [heads, queries].
        other: as ``one``, to the other keys.
        other_weight: as ``one_weight``.

    Returns:
        As ``one``: its type, computed in float32.
    """
    share = torch.sigmoid(other_weight - one_weight).transpose(0, 1).unsqueeze(2)
    return torch.lerp(one.float(), other.float(), share).to(one.dtype)
