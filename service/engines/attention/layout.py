"""The layout of a packed batch: which tokens belong to which sequence, in the forms that the attention functions read.

Sequences are concatenated without padding, and prefixes that several of them share are in the batch once. Cached tokens
follow the batch's own in keys and values alone. The layout holds indices and limits, no states.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from service.engines.attention.cascade import CascadePlan, plan_cascade
from service.engines.attention.kv_cache import CacheTransaction
from service.engines.attention.tiled import TileBatch, plan_tiles
from service.engines.attention.varlen import VarlenMetadata
from service.engines.devices.staging import Staging
from service.engines.linear.batch_invariant import MIN_BLOCK_ROWS, STEP, padded_rows
from service.scheduling.prefix_tree import SequenceLayout, TokenIds, TokenSpan, plan_prefix_sharing

BLOCK = 32
"""On a CPU the queries and keys of one sequence are padded to a multiple of this. Among such sizes, CPU kernels give a
token the same bits independent of the length of its sequence and of the number of computed queries (observed with AMX
and bfloat16)."""


MAX_READ_SHARE = 0.75
"""Largest share of a batch's tokens that the last block computes alone instead of all tokens."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """The attention of one sequence in a chunk: its own tokens attend to all its tokens."""

    own: TokenSpan
    """Its own tokens in the packed batch."""

    num_shared: int
    """Its tokens that precede its own."""

    queries: TokenSpan
    """Its range in the queries that are gathered for the chunk, padding included."""

    keys: TokenSpan
    """Its range in the keys that are gathered for the chunk, padding included."""


@dataclass(frozen=True, slots=True)
class AttentionChunk:
    """Sequences whose states are gathered at once."""

    sequences: tuple[SequenceSpan, ...]

    own: TokenSpan
    """The span of the packed batch that holds the own tokens of all of them."""

    queries: torch.Tensor
    """Indices in the packed batch of the gathered queries: int64, on the device."""

    keys: torch.Tensor
    """Indices of the gathered keys in the packed batch and the cached tokens that follow it: int64, on the device."""

    cu_seqlens_q: torch.Tensor
    """Cumulative numbers of gathered queries: int32 [sequences + 1] on the device."""

    cu_seqlens_k: torch.Tensor
    """Cumulative numbers of gathered keys: int32 [sequences + 1] on the device."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that attention reads on the device."""
        return self.queries, self.keys, self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def metadata(self) -> VarlenMetadata:
        """The limits of the sequences, for a variable-length kernel."""
        max_seqlen_q = max(end - begin for begin, end in (span.queries for span in self.sequences))
        max_seqlen_k = max(end - begin for begin, end in (span.keys for span in self.sequences))
        return VarlenMetadata(self.cu_seqlens_q, self.cu_seqlens_k, max_seqlen_q, max_seqlen_k)


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed batch are; passed through the model's forward to its attention layers."""

    sequences: tuple[SequenceLayout, ...]
    """The layout of each sequence, in the order of the batch."""

    device: torch.device
    """The model's device."""

    block: int = 1
    """The queries and keys that are gathered for a sequence are padded to a multiple of this."""

    num_padding: int = 0
    """Tokens at the end of the packed batch that belong to no sequence."""

    cache_transaction: CacheTransaction | None = None
    """What the pass reads from the prefix cache and writes to it; None: it uses no cache."""

    staged_chunks: tuple[AttentionChunk, ...] = ()
    """The chunks with their tensors on the device; empty where they need not be sent."""

    is_static: bool = False
    """Whether the cumulative lengths change from pass to pass, on the device only, as a CUDA graph requires."""

    cascade_plan: CascadePlan | None = None
    """Attention in two parts; None where no prefix is shared, or cascade attention is off."""

    is_batch_invariant: bool = False
    """Whether no bit of a token's result may depend on the other sequences of the batch."""

    read_tokens: tuple[int, ...] | None = None
    """Tokens of the packed batch whose states are read after the last block, ascending; None: those of all tokens."""

    queries: tuple[int, ...] | None = None
    """Tokens of the packed batch whose attention the CPU kernels compute, ascending; None: that of all tokens."""

    window_masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)
    """Sliding-window masks by window and type, which the layers of a pass share; filled by ``per_sequence``."""

    _tile_batches: dict[tuple[int | None, torch.dtype], list[TileBatch]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        sequences: Sequence[TokenIds],
        device: torch.device,
        *,
        block: int = 1,
        min_shared_tokens: int | None = None,
        batch_invariant_linear: bool = False,
        cached: Sequence[TokenSpan] | None = None,
        cascade: bool = False,
        batch_invariant: bool = False,
    ) -> PackedLayout:
        """Build the layout of a batch.

        Args:
            sequences: token ids; at least one sequence, none empty.
            device: the device of the model.
            block: the queries and keys of each sequence are padded to a multiple of this with its last token, which is
                after all that the real queries attend to.
            min_shared_tokens: common prefixes of at least this many tokens are in the batch once; None: prefixes are
                not shared.
            batch_invariant_linear: whether linear layers multiply blocks of a fixed number of tokens, to a multiple of
                which the batch is padded.
            cached: the cached prefix of each sequence, as in ``CachedTokens.spans``; None: nothing is cached.
            cascade: whether shared prefixes are attended to by cascade attention.
            batch_invariant: whether no bit of a token's result may depend on the other sequences.
        """
        layouts = tuple(plan_prefix_sharing(sequences, min_shared_tokens, cached))
        num_tokens = sum(layout.num_own for layout in layouts)
        min_rows = MIN_BLOCK_ROWS if device.type == "cpu" else STEP
        num_padding = padded_rows(num_tokens, min_rows) - num_tokens if batch_invariant_linear else 0
        shares_prefixes = any(layout.num_shared for layout in layouts)
        cascade_plan = plan_cascade(layouts) if cascade and shares_prefixes and num_tokens else None
        return cls(layouts, device, block, num_padding, cascade_plan=cascade_plan, is_batch_invariant=batch_invariant)

    @cached_property
    def chunks(self) -> tuple[AttentionChunk, ...]:
        """The attention of all sequences in the order of the packed batch, for kernels that gather queries and keys."""
        return self.staged_chunks or tuple(_split_chunks(self.sequences, self.block))

    def reading(self, tokens: Sequence[int]) -> PackedLayout:
        """Return the same layout for a pass after whose last block only the states of these tokens are read.

        Where they are nearly all, to compute them alone would cost more than it saves.
        """
        read = tuple(sorted(set(tokens)))
        return replace(self, read_tokens=read if len(read) <= MAX_READ_SHARE * self.num_tokens else None)

    def with_cache(self, transaction: CacheTransaction) -> PackedLayout:
        """Return the same layout for a pass within this transaction, whose lookup the layout was built with."""
        return replace(self, cache_transaction=transaction)

    def to_device(self, staging: Staging, inputs: Sequence[torch.Tensor]) -> tuple[PackedLayout, list[torch.Tensor]]:
        """Return the layout with its tensors on the device, and other inputs of the pass there: all is sent at once."""
        if self.device.type == "cpu":
            return self, list(inputs)
        plan = self.cascade_plan
        chunk_tensors = [tensor for chunk in self.chunks for tensor in chunk.tensors]
        tensors = staging.to_device([*inputs, *chunk_tensors, *(plan.tensors if plan else [])])
        sent = iter(tensors[len(inputs) :])
        chunks = [
            replace(chunk, queries=next(sent), keys=next(sent), cu_seqlens_q=next(sent), cu_seqlens_k=next(sent))
            for chunk in self.chunks
        ]
        plan = plan.with_tensors(sent) if plan else None
        return replace(self, staged_chunks=tuple(chunks), cascade_plan=plan), tensors[: len(inputs)]

    @cached_property
    def kernel_spans(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention of all sequences, for a kernel that reads tokens where they are.

        int32 [sequences, 5]: first own token, own tokens, tokens before them, first span, spans; and int32 [spans, 2].
        With ``queries`` a row is a range of them.
        """
        owners = [sequence for sequence in self.sequences if sequence.num_own]
        first_spans = accumulate((len(sequence.spans) for sequence in owners), initial=0)
        rows = [
            (begin, num_own, begin - sequence.own[0] + sequence.num_shared, first_span, len(sequence.spans))
            for sequence, first_span in zip(owners, first_spans, strict=False)
            for begin, num_own in self._queries_of(sequence)
        ]
        spans = [span for sequence in owners for span in sequence.spans]
        return torch.tensor(rows, dtype=torch.int32), torch.tensor(spans, dtype=torch.int32)

    def _queries_of(self, sequence: SequenceLayout) -> list[tuple[int, int]]:
        """Return ranges of a sequence's own tokens whose attention is computed, as first token and number of tokens."""
        if self.queries is None:
            return [(sequence.own[0], sequence.num_own)]
        first, end = (bisect_left(self.queries, token) for token in sequence.own)
        ranges: list[tuple[int, int]] = []
        for token in self.queries[first:end]:
            begin, num_tokens = ranges[-1] if ranges else (token, 0)
            if begin + num_tokens == token:
                ranges[-1:] = [(begin, num_tokens + 1)]
            else:
                ranges.append((token, 1))
        return ranges

    def of_read_tokens(self) -> PackedLayout:
        """Return the layout in which attention is computed for the tokens alone that are read after the last block."""
        return replace(self, queries=self.read_tokens)

    def tile_batches(self, window: int | None, dtype: torch.dtype) -> list[TileBatch]:
        """Return the attention of all sequences as tiles, for layers with this window; planned once a pass."""
        if (window, dtype) not in self._tile_batches:
            self._tile_batches[window, dtype] = plan_tiles(self.sequences, window, dtype)
        return self._tile_batches[window, dtype]

    def append_cached(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values as the sequences' spans index them: the batch's, then the cached ones.

        Called once by each attention layer of a pass, in their order; see ``CacheTransaction.append``.
        """
        return (key, value) if self.cache_transaction is None else self.cache_transaction.append(key, value)

    def without_padding(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states of the packed batch, [1, heads, tokens, head dimension], without those of its padding."""
        return states[:, :, : self.num_tokens] if self.num_padding else states

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed batch that belong to a sequence."""
        return sum(sequence.num_own for sequence in self.sequences)

    @property
    def shares_prefixes(self) -> bool:
        """Whether some sequence uses tokens that are computed for another one, or cached ones."""
        return any(sequence.num_shared for sequence in self.sequences)

    @property
    def packed_order(self) -> list[int]:
        """Indices of the sequences in the order of their own tokens in the packed batch."""
        return sorted(range(len(self.sequences)), key=lambda index: self.sequences[index].own)

    def token_ids(self, sequences: Sequence[TokenIds], padding_id: int) -> list[int]:
        """Return the tokens of the packed batch, padding included, given those of the sequences."""
        own = (sequences[index][self.sequences[index].num_shared :] for index in self.packed_order)
        return [token for tokens in own for token in tokens] + [padding_id] * self.num_padding

    def position_ids(self) -> torch.Tensor:
        """Return the position of each token in its sequence: int64 [1, tokens] on the CPU, zeros for padding."""
        sequences = [self.sequences[index] for index in self.packed_order]
        positions = [torch.arange(sequence.num_shared, sequence.num_tokens) for sequence in sequences]
        positions.append(torch.zeros(self.num_padding, dtype=torch.long))
        return torch.cat(positions).unsqueeze(0)


def _split_chunks(sequences: Sequence[SequenceLayout], block: int) -> Iterator[AttentionChunk]:
    """Yield chunks that gather as many keys at once as the packed batch has tokens, or those of one sequence.

    With shared prefixes the sequences have far more tokens in total than the batch, and memory is planned by the batch.
    """
    owners = sorted((sequence for sequence in sequences if sequence.num_own), key=lambda sequence: sequence.own)
    max_keys = sum(_padded(sequence.num_own, block) for sequence in owners)
    chunk: list[SequenceLayout] = []
    num_keys = 0
    for sequence in owners:
        num_keys += _padded(sequence.num_tokens, block)
        if chunk and num_keys > max_keys:
            yield _chunk_of(chunk, block)
            chunk, num_keys = [], _padded(sequence.num_tokens, block)
        chunk.append(sequence)
    yield _chunk_of(chunk, block)


def _chunk_of(sequences: Sequence[SequenceLayout], block: int) -> AttentionChunk:
    cu_seqlens_q = list(accumulate((_padded(sequence.num_own, block) for sequence in sequences), initial=0))
    cu_seqlens_k = list(accumulate((_padded(sequence.num_tokens, block) for sequence in sequences), initial=0))
    return AttentionChunk(
        tuple(
            SequenceSpan(sequence.own, sequence.num_shared, queries, keys)
            for sequence, queries, keys in zip(sequences, pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
        ),
        (sequences[0].own[0], sequences[-1].own[1]),
        _padded_indices([(sequence.own,) for sequence in sequences], block),
        _padded_indices([sequence.spans for sequence in sequences], block),
        torch.tensor(cu_seqlens_q, dtype=torch.int32),
        torch.tensor(cu_seqlens_k, dtype=torch.int32),
    )


def _padded_indices(spans_of_sequences: Sequence[Sequence[TokenSpan]], block: int) -> torch.Tensor:
    """Return the indices in the spans of each sequence, its last one repeated up to a multiple of the block."""
    parts = []
    for spans in spans_of_sequences:
        num_tokens = sum(end - begin for begin, end in spans)
        parts += [torch.arange(begin, end) for begin, end in spans]
        parts.append(torch.full((_padded(num_tokens, block) - num_tokens,), spans[-1][1] - 1))
    return torch.cat(parts)


def _padded(num_tokens: int, block: int) -> int:
    return -(-num_tokens // block) * block
