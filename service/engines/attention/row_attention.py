"""Attention for padded batches whose result for a sequence does not depend on the other sequences of the batch.

Each sequence is attended to by itself, without its padding: the library then sees shapes that only its own length
determines. All other layers compute the whole padded batch. transformers' own attention would choose its kernel by the
longest sequence, and by whether there is padding at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from service.engines.attention.gather import repeat_heads
from service.errors import InvarianceError

ROW_ATTENTION = "row_attention"
"""The name of this attention and its mask function in transformers."""


@dataclass(slots=True)
class PaddedRows:
    """The sequences of the padded batch that is being computed."""

    lengths: Sequence[int]
    """Tokens of each sequence, which are the first of its row."""

    num_calls: int = 0
    """Attention layers that have run."""


_rows: ContextVar[PaddedRows | None] = ContextVar("_rows", default=None)
"""The batch that is being computed: not every model passes arguments of its own to its attention."""


@cache
def register_row_attention() -> str:
    """Register attention and mask function with transformers, once in a process; return their name."""
    AttentionInterface.register(ROW_ATTENTION, row_attention)
    AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)
    return ROW_ATTENTION


@contextmanager
def attending_by_row(lengths: Sequence[int]) -> Iterator[None]:
    """Let attention know the lengths of the sequences of a padded batch while the context is open.

    Raises:
        InvarianceError: no layer of the model has called this attention.
    """
    rows = PaddedRows(lengths)
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)
    if rows.num_calls == 0:
        raise InvarianceError(
            "it computes attention by code of its own, which the longest sequence of a batch may change"
        )


def row_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a padded batch, as transformers' attention layers call it.

    Args:
        module: the attention layer.
        query: [sequences, heads, tokens, head dimension].
        key: [sequences, key heads, tokens, head dimension].
        value: as ``key``.
        mask: bool [sequences or 1, 1, tokens, tokens], true where a query attends to a key; None: see ``is_causal``.
        scaling: factor on the scores; None: one over the square root of the head dimension.
        is_causal: without a mask, whether a query attends only to itself and earlier tokens; None: the layer says it.
        softcap: must be None.
        position_bias: must be None.

    Returns:
        [sequences, tokens, heads, value dimension], zeros for padding; and no weights.

    Raises:
        InvarianceError: scores are capped or biased.
        RuntimeError: no batch is being computed.
    """
    rows = _rows.get()
    if rows is None:
        raise RuntimeError("Attention by row runs within ``attending_by_row`` only")
    if softcap is not None or position_bias is not None:
        raise InvarianceError(
            "its attention scores are capped or biased, for which there is no batch-invariant padded attention"
        )
    rows.num_calls += 1
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    output = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for index, length in enumerate(rows.lengths):
        # Contiguous and always with a mask, since a library may choose its kernel by strides and by a mask.
        own_query, own_key, own_value = (
            states[index : index + 1, :, :length].contiguous() for states in (query, key, value)
        )
        allowed = _mask_of(mask, index, length, query.device, causal=causal)
        attended = scaled_dot_product_attention(own_query, own_key, own_value, attn_mask=allowed, scale=scaling)
        output[index, :length] = attended[0].transpose(0, 1)
    return output, None


def _mask_of(mask: torch.Tensor | None, index: int, length: int, device: torch.device, *, causal: bool) -> torch.Tensor:
    """Return [1, 1, length, length] of one sequence; its values depend on that sequence alone."""
    if mask is None:
        allowed = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
        return allowed.tril() if causal else allowed
    own = mask[index : index + 1] if len(mask) > 1 else mask
    rows = own.expand(-1, -1, max(length, own.shape[2]), -1) if own.shape[2] == 1 else own
    return rows[:, :, :length, :length].contiguous()
