"""Attention within each sequence of a packed batch, as transformers' attention layers call it.

``register_packed_attention`` registers it with transformers, together with a mask function that builds no mask. CUDA
runs one variable-length kernel for all sequences; a CPU runs tiled attention or one sequence after the other. Where
sequences share a prefix, only their own tokens are queries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from service.engines.attention.call import AttentionCall, PackingUnsupportedError, transformers_attention
from service.engines.attention.cascade import attend_cascade
from service.engines.attention.gather import gather_tokens
from service.engines.attention.per_sequence import attend_chunk
from service.engines.attention.tiled import attend_tiles
from service.engines.attention.varlen import attend_varlen
from service.engines.devices.device import has_amx, has_native_bfloat16

ATTENTION = "packed_attention"
"""The name of this attention and its mask function in transformers."""

MAX_FLASH_HEAD_DIM = 256
"""Largest head dimension of torch's flash attention."""


@cache
def register_packed_attention() -> str:
    """Register attention and mask function with transformers, once in a process; return their name."""
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, no_mask)
    return ATTENTION


def no_mask(*, use_vmap: bool = False, **_kwargs: Any) -> None:
    """Build no mask: ``attend`` applies causality, sliding windows and the limits of the sequences itself.

    Raises:
        PackingUnsupportedError: the model adds its own pattern to the mask, which transformers evaluates with vmap.
    """
    if use_vmap:
        raise PackingUnsupportedError("The model adds a pattern of its own to the attention mask")


def attend(call: AttentionCall) -> torch.Tensor:
    """Compute attention within each sequence of a packed batch.

    Returns:
        [1, tokens, heads, value dimension]; zeros for padding that belongs to no sequence of the layout.

    Raises:
        PackingUnsupportedError: the layer is not causal, the model did not pass the layout on, or the layout is static
            and the variable-length kernel does not support the call.
    """
    layout = call.layout
    key, value = layout.append_cached(call.key, call.value)
    has_varlen = call.softcap is None and _has_varlen_kernel(call.query, call.value)
    if layout.is_batch_invariant and layout.shares_prefixes and not (has_varlen or _shares_exactly(call)):
        raise PackingUnsupportedError(
            "With a shared prefix this attention adds in another order, and rewards must be batch-invariant"
        )
    call = replace(call, key=key, value=value)
    if has_varlen:
        return _attend_varlen(call)
    if layout.is_static:
        raise PackingUnsupportedError(
            "A static layout, with cu_seqlens on the device, needs the variable-length kernel"
        )
    query = call.query
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    output[:, layout.num_tokens :] = 0  # uninitialized memory may hold NaN, which is slow to compute with on a CPU
    if call.softcap is None and prefers_tiled_attention(query.device, query.dtype):
        for tiles in layout.tile_batches(call.window, query.dtype):
            attend_tiles(output, tiles, query, key, value, scaling=call.scale)
    else:
        for chunk in layout.chunks:
            attend_chunk(output, chunk, call)
    return output


packed_attention = transformers_attention(attend)


def prefers_tiled_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention in batched matrix products is faster than torch's fused kernel.

    The fused kernel multiplies bfloat16 fast only with AMX; elsewhere it has a tenth of the rate of ``bmm``. The
    choice does not depend on lengths, so that the states of a prefix have the same bits whichever sequences share it.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and has_native_bfloat16() and not has_amx()


def _shares_exactly(call: AttentionCall) -> bool:
    """Whether attention without the variable-length kernel gives a token the same bits with a shared prefix as without.

    In bfloat16 on a CPU the tests show it (decision 0010), but for capped scores.
    """
    return call.query.device.type == "cpu" and call.query.dtype == torch.bfloat16 and call.softcap is None


def _has_varlen_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's variable-length flash attention supports these tensors."""
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        and head_dim <= MAX_FLASH_HEAD_DIM
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_varlen(call: AttentionCall) -> torch.Tensor:
    """Compute attention for all sequences of a chunk in one kernel call.

    Without shared prefixes the packed batch itself is the one chunk. The kernel (FlashAttention-2, from version 2.1)
    aligns a sequence's last query with its last key, for causality and sliding windows alike. Padding of the packed
    batch gets zeros.
    """
    layout, scaling, window = call.layout, call.scaling, call.window
    plan = layout.cascade_plan
    if plan is not None and plan.is_valid_for(window):
        query, key, value = (states[0].transpose(0, 1) for states in (call.query, call.key, call.value))
        return attend_cascade(query, key, value, plan, scaling=scaling, window=window).unsqueeze(0)
    parts = []
    for chunk in layout.chunks:
        key, value = (
            (gather_tokens(states, chunk.keys) if layout.shares_prefixes else layout.without_padding(states))[
                0
            ].transpose(0, 1)
            for states in (call.key, call.value)
        )
        query = call.query[0, :, slice(*chunk.own)].transpose(0, 1)
        attended, _ = attend_varlen(
            query,
            key,
            value,
            chunk.metadata,
            scaling=scaling,
            window=window,
            batch_invariant=layout.is_batch_invariant,
        )
        parts.append(attended)
    if layout.num_padding:
        parts.append(call.query.new_zeros(layout.num_padding, *parts[0].shape[1:]))
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output.unsqueeze(0)
