"""Cascade attention: a shared prefix is attended to once for all its sequences, each sequence's own tokens separately.

A softmax over all keys is a weighted mean of the softmax over the first keys and the one over the rest; the weights
follow from the log-sum-exp of both. So the keys of a prefix need not be gathered for every sequence. The plan is pure
data; the attention of both parts is ``attend_varlen``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import torch

from service.engines.attention.varlen import VarlenMetadata, attend_varlen
from service.scheduling.prefix_tree import SequenceLayout, TokenSpan

PrefixGroup: TypeAlias = tuple[tuple[TokenSpan, ...], list[SequenceLayout]]
"""The spans of a prefix, and the sequences that share it."""


@dataclass(frozen=True, slots=True)
class PrefixChunk:
    """Some prefixes, and all tokens that follow them."""

    queries: torch.Tensor
    """Indices in the packed batch of the tokens that follow the prefixes, prefix by prefix: int64."""

    keys: torch.Tensor
    """Indices in the packed batch of the tokens of the prefixes: int64."""

    metadata: VarlenMetadata
    """Limits of the prefixes among queries and keys."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that attention reads on the device."""
        return [self.queries, self.keys, self.metadata.cu_seqlens_q, self.metadata.cu_seqlens_k]

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> PrefixChunk:
        """Return the same chunk with its tensors, in the order of ``tensors``, replaced."""
        queries, keys, cu_seqlens_q, cu_seqlens_k = (next(tensors) for _ in range(4))
        lengths = self.metadata.max_seqlen_q, self.metadata.max_seqlen_k
        return PrefixChunk(queries, keys, VarlenMetadata(cu_seqlens_q, cu_seqlens_k, *lengths))


@dataclass(frozen=True, slots=True)
class CascadePlan:
    """The attention of a packed batch in two parts."""

    own: VarlenMetadata
    """Limits of the sequences' own tokens, which attend to each other first."""

    prefix_chunks: tuple[PrefixChunk, ...]
    """The prefixes, which the tokens behind them attend to in the second part."""

    max_sequence_tokens: int
    """Tokens of the longest sequence, shared ones included."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that attention reads on the device."""
        return [self.own.cu_seqlens_q, *(tensor for chunk in self.prefix_chunks for tensor in chunk.tensors)]

    def with_tensors(self, tensors: Iterator[torch.Tensor]) -> CascadePlan:
        """Return the same plan with its tensors, in the order of ``tensors``, replaced."""
        cu_seqlens = next(tensors)
        own = VarlenMetadata(cu_seqlens, cu_seqlens, self.own.max_seqlen_q, self.own.max_seqlen_k)
        chunks = tuple(chunk.with_tensors(tensors) for chunk in self.prefix_chunks)
        return CascadePlan(own, chunks, self.max_sequence_tokens)

    def is_valid_for(self, window: int | None) -> bool:
        """Whether all tokens attend to all of their prefix, which a sliding window shorter than a sequence prevents."""
        return window is None or self.max_sequence_tokens <= window


def plan_cascade(sequences: Sequence[SequenceLayout]) -> CascadePlan:
    """Plan the attention of the sequences of a packed batch without padding; the tensors are on the CPU."""
    owners = sorted((sequence for sequence in sequences if sequence.num_own), key=lambda sequence: sequence.own)
    num_own = [sequence.num_own for sequence in owners]
    groups: dict[tuple[TokenSpan, ...], list[SequenceLayout]] = {}
    for sequence in owners:
        if sequence.num_shared:
            groups.setdefault(sequence.spans[:-1], []).append(sequence)
    chunks = tuple(_chunk_of(part) for part in _split_groups(groups, max_keys=owners[-1].own[1]))
    return CascadePlan(_metadata(num_own, num_own), chunks, max(sequence.num_tokens for sequence in sequences))


def _split_groups(
    groups: dict[tuple[TokenSpan, ...], list[SequenceLayout]], max_keys: int
) -> Iterator[list[PrefixGroup]]:
    """Split the prefixes so that no more keys are gathered at once than the packed batch has, or one prefix."""
    part: list[PrefixGroup] = []
    num_keys = 0
    for spans, sequences in groups.items():
        num_keys += _num_tokens(spans)
        if part and num_keys > max_keys:
            yield part
            part, num_keys = [], _num_tokens(spans)
        part.append((spans, sequences))
    if part:
        yield part


def _chunk_of(part: Sequence[PrefixGroup]) -> PrefixChunk:
    return PrefixChunk(
        _indices([sequence.own for _, sequences in part for sequence in sequences]),
        _indices([span for spans, _ in part for span in spans]),
        _metadata(
            [sum(sequence.num_own for sequence in sequences) for _, sequences in part],
            [_num_tokens(spans) for spans, _ in part],
        ),
    )


def _metadata(num_queries: Sequence[int], num_keys: Sequence[int]) -> VarlenMetadata:
    return VarlenMetadata(_cu_seqlens(num_queries), _cu_seqlens(num_keys), max(num_queries), max(num_keys))


def _cu_seqlens(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


def _indices(spans: Sequence[TokenSpan]) -> torch.Tensor:
    return torch.cat([torch.arange(begin, end) for begin, end in spans])


def _num_tokens(spans: Sequence[TokenSpan]) -> int:
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
    """Compute attention within each sequence of a packed batch by a plan that is valid for the window.

    Args:
        query: [tokens, heads, head dimension].
        key: [tokens, key heads, head dimension].
        value: as ``key``.
        plan: with its tensors on the device.
        scaling: as for ``attend_varlen``.
        window: as for ``attend_varlen``.

    Returns:
        [tokens, heads, head dimension].
    """
    output, lse = attend_varlen(query, key, value, plan.own, scaling=scaling, window=window)
    for chunk in plan.prefix_chunks:
        queries = query.index_select(0, chunk.queries)
        keys, values = (states.index_select(0, chunk.keys) for states in (key, value))
        prefix, prefix_lse = attend_varlen(queries, keys, values, chunk.metadata, scaling=scaling, causal=False)
        own, own_lse = output.index_select(0, chunk.queries), lse.index_select(1, chunk.queries)
        output.index_copy_(0, chunk.queries, merge_attention(own, own_lse, prefix, prefix_lse))
    return output


def merge_attention(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> torch.Tensor:
    """Return the attention to the union of two disjoint sets of keys, given the attention to each.

    The online softmax of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).

    Args:
        first: attention to the first set, [queries, heads, head dimension].
        first_lse: log-sum-exp of its scores, float32 [heads, queries].
        second: attention to the second set, as ``first``.
        second_lse: as ``first_lse``.

    Returns:
        As ``first``: its type, computed in float32.
    """
    weight = torch.sigmoid(second_lse - first_lse).transpose(0, 1).unsqueeze(2)
    return torch.lerp(first.float(), second.float(), weight).to(first.dtype)
