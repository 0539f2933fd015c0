"""Attention within a packed batch on the CPU kernels, as transformers' own attention layers call it."""

from __future__ import annotations

from functools import partial

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from service.engines.attention.call import AttentionCall, transformers_attention
from service.engines.attention.interface import ATTENTION, attend, no_mask
from service.engines.kernels.bindings import Kernels

KERNEL_ATTENTION = f"{ATTENTION}_kernels"
"""The name of this attention and its mask function in transformers."""


def register_kernel_attention(kernels: Kernels) -> str:
    """Register attention on these kernels with transformers, in place of earlier kernels; return its name."""
    AttentionInterface.register(KERNEL_ATTENTION, transformers_attention(partial(attend_on_kernels, kernels)))
    AttentionMaskInterface.register(KERNEL_ATTENTION, no_mask)
    return KERNEL_ATTENTION


def attend_on_kernels(kernels: Kernels, call: AttentionCall) -> torch.Tensor:
    """Compute attention on the CPU kernels; the same shapes and errors as ``interface.attend``."""
    layout, scaling = call.layout, call.scale
    num_heads, num_tokens, head_size = call.query.shape[1:]
    # The kernel subtracts the largest product before it scales, which is right for positive factors only.
    if call.value.shape[3] != head_size or scaling <= 0:
        return attend(call)
    key, value = layout.append_cached(call.key, call.value)
    output = call.query.new_empty((1, num_tokens, num_heads, head_size))
    output[:, layout.num_tokens :] = 0  # padding, which the kernel does not write
    query, key, value = (
        states if states.stride(3) == 1 else states.contiguous() for states in (call.query, key, value)
    )
    sequences, spans = layout.kernel_spans
    kernels.attention(
        query,
        key,
        value,
        output,
        sequences,
        spans,
        scaling=scaling,
        window=call.window,
        softcap=call.softcap,
    )
    return output
