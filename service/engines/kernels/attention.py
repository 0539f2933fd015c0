"""Attention within a packed row on the kernels, as transformers' own attention layers call it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from service.engines.attention.interface import (
    ATTENTION,
    PackingUnsupportedError,
    is_causal_layer,
    no_mask,
    packed_attention,
)
from service.engines.attention.layout import Packing
from service.engines.kernels.bindings import Kernels

KERNEL_ATTENTION = f"{ATTENTION}_kernels"
"""The name under which transformers knows this attention."""


def register_attention(kernels: Kernels) -> str:
    """Make attention on these kernels known to transformers, and return its name."""
    AttentionInterface.register(KERNEL_ATTENTION, partial(kernel_attention, kernels))
    AttentionMaskInterface.register(KERNEL_ATTENTION, no_mask)
    return KERNEL_ATTENTION


def kernel_attention(
    kernels: Kernels,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Do what ``attention.packed_attention`` does; the same shapes, and the same error."""
    if packing is None or not is_causal_layer(module, is_causal):
        raise PackingUnsupportedError("A layer is not causal, or the model does not pass on the layout of the row")
    num_heads, num_tokens, head_size = query.shape[1:]
    scaling = head_size**-0.5 if scaling is None else scaling
    if value.shape[3] != head_size or scaling <= 0:  # the kernel takes the largest score before it scales
        return packed_attention(
            module, query, key, value, mask, packing=packing, scaling=scaling, sliding_window=sliding_window,
            softcap=softcap, is_causal=is_causal,
        )  # fmt: skip
    key, value = packing.extended(key, value)
    output = query.new_empty((1, num_tokens, num_heads, head_size))
    output[:, packing.num_tokens :] = 0
    query, key, value = (states if states.stride(3) == 1 else states.contiguous() for states in (query, key, value))
    sequences, spans = packing.kernel_spans
    kernels.attend(
        query,
        key,
        value,
        output,
        sequences,
        spans,
        scaling=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return output, None
