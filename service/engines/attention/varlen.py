"""Attention over sequences of any lengths that stand end to end, in one call, with the log-sum-exp of its scores.

On CUDA this is torch's flash attention; elsewhere the same in plain matrix products over a mask. Those grow with the
square of the row and serve nobody: they say what the kernel has to give, where there is no GPU.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.varlen import AuxRequest, varlen_attn

SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether the kernel of this torch takes keys that query heads share; torch 2.11 does not."""


@dataclass(frozen=True, slots=True)
class Borders:
    """Where sequences begin, and the last one ends, among queries and keys; a sequence may be empty in both.

    ``queries``, ``keys``: int32 [sequences + 1] on the device. ``max_seqlen_q``, ``max_seqlen_k``: what no sequence has
    more of.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    *,
    scaling: float | None,
    window: int | None = None,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Let the queries of each sequence attend to its keys; its last query is aligned with its last key.

    Args:
        query: [queries, heads, head dimension].
        key: [keys, key heads, head dimension].
        value: as ``key``.
        borders: of the sequences; no query may be without a key.
        scaling: factor on the scores; None: one over the root of the head dimension.
        window: keys that a query sees, its own place included; None: all. Only with ``causal``.
        causal: whether a query sees only what stands before it.

    Returns:
        [queries, heads, head dimension], and the natural logarithm of the sum of exponentials of each query's scaled
        scores: float32 [heads, queries].
    """
    if not _has_kernel(query.device):
        return reference(query, key, value, borders, scaling=scaling, window=window, causal=causal)
    options: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if SHARES_KEYS:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    attended: Any = varlen_attn(
        query,
        key,
        value,
        borders.queries,
        borders.keys,
        borders.max_seqlen_q,
        borders.max_seqlen_k,
        return_aux=AuxRequest(lse=True),
        scale=scaling,
        # How far a query sees to the left and to the right of itself; -1: to the end.
        window_size=(-1 if window is None else window - 1, 0 if causal else -1),
        **options,
    )
    return attended[0], attended[1]


def _has_kernel(device: torch.device) -> bool:
    """Whether torch's kernel runs here; on the meta device its shapes do."""
    return device.type in {"cuda", "meta"}


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    *,
    scaling: float | None,
    window: int | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what ``attend_varlen`` promises, by its definition."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    asking, asking_depth = _owners(borders.queries, query.shape[0])
    seen, seen_depth = _owners(borders.keys, key.shape[0])
    surplus = (borders.keys.diff() - borders.queries.diff())[asking]
    distance = (asking_depth + surplus)[:, None] - seen_depth
    hidden = asking[:, None] != seen
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance >= window
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float())
    scores = (scores * (query.shape[2] ** -0.5 if scaling is None else scaling)).masked_fill(hidden, float("-inf"))
    attended = torch.einsum("hqk,khd->qhd", torch.softmax(scores, dim=-1), value.float())
    return attended.to(query.dtype), torch.logsumexp(scores, dim=-1)


def _owners(borders: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each token which sequence it belongs to, and how many of that one's tokens stand before it."""
    places = torch.arange(num_tokens, dtype=borders.dtype)
    owners = torch.searchsorted(borders, places, right=True) - 1
    return owners, places - borders[owners]
