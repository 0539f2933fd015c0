"""The layout of a packed row: which of its positions belong to which sequence, as attention needs to know it.

Sequences stand end to end, without padding, and what several of them begin alike stands there once. What earlier passes
have kept of beginnings stands behind the row's tokens, in keys and values alone. It knows positions only, no states;
attention over them is ``attention``'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from service.engines.attention.cascade import CascadePlan, plan_cascade
from service.engines.attention.kv_cache import CacheTransaction
from service.engines.attention.tiled import TileBatch, cut_tiles
from service.engines.devices.staging import Staging
from service.engines.linear.batch_invariant import padded_rows
from service.scheduling.prefix_tree import Branch, Span, grow_branches

BLOCK = 32
"""Queries and keys of one sequence are multiples of this. Among such, CPU kernels give a token the same bits whatever
its sequence's length and whichever of its queries are asked for (seen with AMX and bfloat16)."""


@dataclass(frozen=True, slots=True)
class SequenceSpan:
    """What attention does for one sequence: its own tokens look at all its tokens.

    ``own``: its own tokens in the row. ``num_shared``: tokens that it has before them. ``queries`` and ``keys``: where
    both stand among the gathered ones of its slab.
    """

    own: Span
    num_shared: int
    queries: Span
    keys: Span


@dataclass(frozen=True, slots=True)
class AttentionChunk:
    """Strands whose states are gathered at once, and the positions in the row that are gathered for them.

    ``own``: the piece of the row that is theirs. ``queries``, ``keys``: int64 positions on the device.
    ``cu_seqlens_q``, ``cu_seqlens_k``: where each strand begins among them, and the last one ends; int32 [strands + 1]
    on the device, as variable-length kernels take them.
    """

    sequences: tuple[SequenceSpan, ...]
    own: Span
    queries: torch.Tensor
    keys: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that attention reads on the device."""
        return self.queries, self.keys, self.cu_seqlens_q, self.cu_seqlens_k

    @property
    def max_seqlen_q(self) -> int:
        """Queries of the strand that has most."""
        return max(end - begin for begin, end in (span.queries for span in self.sequences))

    @property
    def max_seqlen_k(self) -> int:
        """Keys of the strand that has most."""
        return max(end - begin for begin, end in (span.keys for span in self.sequences))


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed row stand.

    ``branches``: the place of each sequence, in their order. ``block``: of which the queries and keys of a strand are a
    multiple. ``num_filler``: tokens at the end of the row that belong to nobody. ``visit``: what the pass takes from
    earlier ones and leaves for later ones. ``staged_chunks``: the slabs with their tensors on the device; empty where
    they need not be sent. ``is_static``: whether the borders that count are known to the device only. ``cascade_plan``:
    attention in two parts, where beginnings are shared and that is wanted. ``bands``: masks that the layers of this
    pass have in common; filled by attention.
    """

    branches: tuple[Branch, ...]
    device: torch.device
    block: int = 1
    num_filler: int = 0
    visit: CacheTransaction | None = None
    staged_chunks: tuple[AttentionChunk, ...] = ()
    is_static: bool = False
    cascade_plan: CascadePlan | None = None
    bands: dict[tuple[int | None, torch.dtype], torch.Tensor] = field(default_factory=dict)
    _tilings: dict[tuple[int | None, torch.dtype], list[TileBatch]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Sequence[tuple[int, ...]],
        device: torch.device,
        *,
        block: int = 1,
        shortest_shared: int | None = None,
        batch_invariant_linear: bool = False,
        visit: CacheTransaction | None = None,
        cascade: bool = False,
    ) -> Packing:
        """Lay out sequences of token ids; with row blocks, up to a length that suits those.

        Args:
            rows: at least one, none empty.
            device: of the model.
            block: of which the queries and keys of each sequence are a multiple, filled up with its last token; those
                come after all that it looks at.
            shortest_shared: common beginnings of at least so many tokens stand in the row once; None: none does.
            batch_invariant_linear: whether linear layers multiply in row blocks.
            visit: what earlier passes have kept of these sequences; None: nothing.
            cascade: whether attention to shared beginnings is merged with that to own tokens.
        """
        branches = tuple(grow_branches(rows, shortest_shared, visit.spans if visit else None))
        num_tokens = sum(branch.num_own for branch in branches)
        num_filler = padded_rows(num_tokens) - num_tokens if batch_invariant_linear else 0
        shares = any(branch.num_shared for branch in branches)
        cascade_plan = plan_cascade(branches) if cascade and shares and num_tokens else None
        return cls(branches, device, block, num_filler, visit, cascade_plan=cascade_plan)

    @cached_property
    def chunks(self) -> tuple[AttentionChunk, ...]:
        """All the work of attention, in the order of the row, for kernels that take one sequence after another."""
        return self.staged_chunks or tuple(_cut_chunks(self.branches, self.block))

    def staged(self, staging: Staging, inputs: Sequence[torch.Tensor]) -> tuple[Packing, list[torch.Tensor]]:
        """Return the layout as the device reads it, and other inputs of the pass there: all is sent at once."""
        if self.device.type == "cpu":
            return self, list(inputs)
        plan = self.cascade_plan
        slab_tensors = [tensor for chunk in self.chunks for tensor in chunk.tensors]
        tensors = staging.to_device([*inputs, *slab_tensors, *(plan.tensors if plan else [])])
        arrived = iter(tensors[len(inputs) :])
        chunks = [
            replace(
                chunk,
                queries=next(arrived),
                keys=next(arrived),
                cu_seqlens_q=next(arrived),
                cu_seqlens_k=next(arrived),
            )
            for chunk in self.chunks
        ]
        plan = plan.moved(arrived) if plan else None
        return replace(self, staged_chunks=tuple(chunks), cascade_plan=plan), tensors[: len(inputs)]

    @cached_property
    def kernel_spans(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All the work of attention, for a kernel that finds its tokens by itself.

        int32 [sequences, 5]: first own token, own tokens, tokens before them, first span, spans; and int32 [spans, 2].
        """
        owners = [branch for branch in self.branches if branch.num_own]
        firsts = accumulate((len(branch.spans) for branch in owners), initial=0)
        sequences = [
            (branch.own[0], branch.num_own, branch.num_shared, first, len(branch.spans))
            for branch, first in zip(owners, firsts, strict=False)
        ]
        spans = [span for branch in owners for span in branch.spans]
        return torch.tensor(sequences, dtype=torch.int32), torch.tensor(spans, dtype=torch.int32)

    def tilings(self, window: int | None, dtype: torch.dtype) -> list[TileBatch]:
        """Return all the work of attention as tiles, for layers with this window; cut once a pass."""
        if (window, dtype) not in self._tilings:
            self._tilings[window, dtype] = cut_tiles(self.branches, window, dtype)
        return self._tilings[window, dtype]

    def extended(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's keys and values where the sequences' spans point: those of the row, and of kept tokens."""
        return (key, value) if self.visit is None else self.visit.extended(key, value)

    @property
    def num_tokens(self) -> int:
        """Tokens in the row that belong to a sequence."""
        return sum(branch.num_own for branch in self.branches)

    @property
    def shares(self) -> bool:
        """Whether some sequence uses the tokens of another, or of an earlier pass."""
        return any(branch.num_shared for branch in self.branches)

    @property
    def in_row_order(self) -> list[int]:
        """Which sequence's own tokens come first, second and so on."""
        return sorted(range(len(self.branches)), key=lambda index: self.branches[index].own)

    def token_ids(self, rows: Sequence[tuple[int, ...]], filler_id: int) -> list[int]:
        """Return the tokens of the row, filler included."""
        own = (rows[index][self.branches[index].num_shared :] for index in self.in_row_order)
        return [token for tokens in own for token in tokens] + [filler_id] * self.num_filler

    def position_ids(self) -> torch.Tensor:
        """Return how many tokens of its sequence stand before each: int64 [1, tokens] on the CPU, zeros for filler."""
        branches = [self.branches[index] for index in self.in_row_order]
        counts = [torch.arange(branch.num_shared, branch.num_tokens) for branch in branches]
        counts.append(torch.zeros(self.num_filler, dtype=torch.long))
        return torch.cat(counts).unsqueeze(0)


def _cut_chunks(branches: Sequence[Branch], block: int) -> Iterator[AttentionChunk]:
    """Yield slabs that gather as many tokens at once as the row has, or one longest sequence.

    Sequences that share much have far more tokens together than the row, and memory is planned by the row.
    """
    owners = sorted((branch for branch in branches if branch.num_own), key=lambda branch: branch.own)
    room = sum(_filled(branch.num_own, block) for branch in owners)
    waiting: list[Branch] = []
    num_keys = 0
    for branch in owners:
        num_keys += _filled(branch.num_tokens, block)
        if waiting and num_keys > room:
            yield _chunk_of(waiting, block)
            waiting, num_keys = [], _filled(branch.num_tokens, block)
        waiting.append(branch)
    yield _chunk_of(waiting, block)


def _chunk_of(branches: Sequence[Branch], block: int) -> AttentionChunk:
    queries = list(accumulate((_filled(branch.num_own, block) for branch in branches), initial=0))
    keys = list(accumulate((_filled(branch.num_tokens, block) for branch in branches), initial=0))
    return AttentionChunk(
        tuple(
            SequenceSpan(branch.own, branch.num_shared, *both)
            for branch, *both in zip(branches, pairwise(queries), pairwise(keys), strict=True)
        ),
        (branches[0].own[0], branches[-1].own[1]),
        _positions([[branch.own] for branch in branches], block),
        _positions([branch.spans for branch in branches], block),
        torch.tensor(queries, dtype=torch.int32),
        torch.tensor(keys, dtype=torch.int32),
    )


def _positions(pieces: Sequence[Sequence[Span]], block: int) -> torch.Tensor:
    """Return the positions that the spans of each sequence hold, filled up to a multiple of the block."""
    parts = []
    for spans in pieces:
        num_tokens = sum(end - begin for begin, end in spans)
        parts += [torch.arange(begin, end) for begin, end in spans]
        parts.append(torch.full((_filled(num_tokens, block) - num_tokens,), spans[-1][1] - 1))
    return torch.cat(parts)


def _filled(num_tokens: int, block: int) -> int:
    return -(-num_tokens // block) * block
