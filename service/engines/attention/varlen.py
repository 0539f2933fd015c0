"""Variable-length attention: one call for sequences of any lengths, concatenated, with the log-sum-exp of its scores.

On CUDA this is torch's flash attention. Elsewhere ``reference`` computes the same in plain matrix products with a mask;
its cost grows with the square of the tokens, and it serves only to define and test what the kernel returns.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn

HAS_GROUPED_QUERIES = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether the kernel of this torch supports grouped-query attention; torch 2.11 does not."""

HAS_NUM_SPLITS = "num_splits" in inspect.signature(varlen_attn).parameters
"""Whether this torch lets a caller forbid that the keys of a sequence are split; torch 2.11 does not."""


@dataclass(frozen=True, slots=True)
class VarlenMetadata:
    """The limits of concatenated sequences, in the terms of flash-attention; a sequence may be empty in both."""

    cu_seqlens_q: torch.Tensor
    """Cumulative numbers of queries, from zero: int32 [sequences + 1] on the device."""

    cu_seqlens_k: torch.Tensor
    """Cumulative numbers of keys, from zero: int32 [sequences + 1] on the device."""

    max_seqlen_q: int
    """Upper bound of the queries of a sequence."""

    max_seqlen_k: int
    """Upper bound of the keys of a sequence."""


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: VarlenMetadata,
    *,
    scaling: float | None,
    window: int | None = None,
    causal: bool = True,
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the queries of each sequence attend to its keys; its last query is aligned with its last key.

    Args:
        query: [queries, heads, head dimension].
        key: [keys, key heads, head dimension].
        value: as ``key``.
        metadata: the limits of the sequences; no query may be without a key.
        scaling: factor on the scores; None: one over the square root of the head dimension.
        window: keys that a query attends to, its own position included; None: all. Only with ``causal``.
        causal: whether a query attends only to its own and earlier positions.
        batch_invariant: whether the bits of a query's result may depend on its own sequence only.

    Returns:
        [queries, heads, head dimension], and the natural logarithm of the sum of exponentials of each query's scaled
        scores: float32 [heads, queries].
    """
    if not _has_kernel(query.device):
        return reference(query, key, value, metadata, scaling=scaling, window=window, causal=causal)
    options: dict[str, Any] = {}
    if batch_invariant:
        metadata = batch_invariant_metadata(metadata, window)
        options = {"num_splits": 1} if HAS_NUM_SPLITS else {}
    groups = query.shape[1] // key.shape[1]
    if HAS_GROUPED_QUERIES:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attended: Any = varlen_attn(
        query,
        key,
        value,
        metadata.cu_seqlens_q,
        metadata.cu_seqlens_k,
        metadata.max_seqlen_q,
        metadata.max_seqlen_k,
        return_aux=AuxRequest(lse=True),
        scale=scaling,
        # Keys to the left and to the right of a query's own position; -1: no limit.
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        **options,
    )
    return attended[0], attended[1]


def batch_invariant_metadata(metadata: VarlenMetadata, window: int | None) -> VarlenMetadata:
    """Return the same limits with bounds by which the kernel chooses nothing that depends on the batch.

    FlashAttention-2 in torch (``mha_varlen_fwd``) reads the upper bounds in two decisions beside the size of its grid.
    Where no sequence has more than one query it computes without causality, in other tiles, and with grouped queries it
    splits the keys; so the bound is at least two. Where no sequence is longer than the window it computes without one,
    in other tiles; so the bound is at least the window. What is left depends on the sequence alone: its keys are read
    in blocks that begin at its first key, and a block that is masked for a query leaves the query's sums as they are.
    """
    return replace(
        metadata, max_seqlen_q=max(metadata.max_seqlen_q, 2), max_seqlen_k=max(metadata.max_seqlen_k, window or 0)
    )


def _has_kernel(device: torch.device) -> bool:
    """Whether torch's kernel runs here; on the meta device its shapes are computed."""
    return device.type in {"cuda", "meta"}


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    metadata: VarlenMetadata,
    *,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what ``attend_varlen`` returns, by its definition, in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    query_sequence, query_position = _sequence_and_position(metadata.cu_seqlens_q, query.shape[0])
    key_sequence, key_position = _sequence_and_position(metadata.cu_seqlens_k, key.shape[0])
    surplus = (metadata.cu_seqlens_k.diff() - metadata.cu_seqlens_q.diff())[query_sequence]
    distance = (query_position + surplus)[:, None] - key_position
    hidden = query_sequence[:, None] != key_sequence
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance >= window
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float())
    scores = (scores * (query.shape[2] ** -0.5 if scaling is None else scaling)).masked_fill(hidden, float("-inf"))
    attended = torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), value.float())
    return attended.to(query.dtype), torch.logsumexp(scores, dim=-1)


def _sequence_and_position(cu_seqlens: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of each token's sequence, and its position within that sequence."""
    indices = torch.arange(num_tokens, dtype=cu_seqlens.dtype)
    sequences = torch.searchsorted(cu_seqlens, indices, right=True) - 1
    return sequences, indices - cu_seqlens[sequences]
