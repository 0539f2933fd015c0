"""Attention within each sequence of a packed row, as transformers' own attention layers call it.

Registered through ``AttentionInterface``, with a mask function that builds nothing. A CPU goes from sequence to
sequence; CUDA has one kernel for all. Where a sequence shares its beginning with others, only its own tokens ask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from service.engines.attention.cascade import attend_cascade
from service.engines.attention.layout import BLOCK, AttentionChunk, Packing, SequenceSpan
from service.engines.attention.tiled import TileBatch
from service.engines.attention.varlen import Borders, attend_varlen
from service.engines.devices.device import has_amx, has_native_bfloat16
from service.engines.devices.staging import copy_to_device

ATTENTION = "packed_rows"
"""The name under which transformers knows our attention and mask functions."""

QUERY_BLOCK = 512
"""Queries that share one explicit mask or score matrix, so that none grows with the square of a sequence."""

KEY_BLOCK = 512
"""Keys out of a window are left out in multiples of this, torch's own block of keys, so that no rounding moves."""

HEAD_STEP = 32
"""Heads of half precision on a CPU are filled up with zeros to a multiple of this; with other sizes a token's bits
depend on the length of its sequence."""

LARGEST_FLASH_HEAD = 256
"""Largest head dimension of torch's flash attention."""


class PackingUnsupportedError(RuntimeError):
    """The model asks something of attention that the packed path does not carry."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sequence of a packed row; called by the model's own attention layers.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, head dimension].
        key: [1, key heads, tokens, head dimension].
        value: as ``key``.
        packing: the layout of the row; handed through by the model's forward.
        scaling: factor on the scores; None: one over the root of the head dimension.
        sliding_window: tokens that a query sees, itself included; None: all before it.
        softcap: scores are bent to ``softcap * tanh(score / softcap)``; None: left as they are.
        is_causal: whether a query sees only what stands before it; None: what the layer says.

    Returns:
        [1, tokens, heads, head dimension], and no attention weights.

    Raises:
        PackingUnsupportedError: the layer is not causal, or the model did not hand the layout through.
    """
    causal = is_causal_layer(module, is_causal)
    return attend(
        query, key, value, packing, is_causal=causal, scaling=scaling, window=sliding_window, softcap=softcap
    ), None


def is_causal_layer(module: torch.nn.Module, asked: bool | None) -> bool:
    """Whether a query sees only what stands before it: as the call says, else as the layer does."""
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing | None,
    *,
    is_causal: bool,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend within each sequence of a packed row; see ``packed_attention``."""
    if packing is None or not is_causal:
        raise PackingUnsupportedError("A layer is not causal, or the model does not pass on the layout of the row")
    key, value = packing.extended(key, value)
    if softcap is None and _has_varlen_kernel(query, value):
        return _attend_varlen(query, key, value, packing, scaling, window)
    if packing.is_static:
        raise PackingUnsupportedError("Borders that only the device knows need the variable-length kernel")
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    output[:, packing.num_tokens :] = 0  # whatever stood there may be NaN, which slows down a CPU
    if softcap is None and prefers_tiles(query.device, query.dtype):
        for tiles in packing.tilings(window, query.dtype):
            _attend_tiles(output, tiles, query, key, value, scaling)
    else:
        for chunk in packing.chunks:
            _attend_slab(output, chunk, query, key, value, packing, scaling, window, softcap)
    return output


def prefers_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention made of batched matrix products is faster than torch's fused kernel.

    That kernel multiplies bfloat16 well with AMX alone; elsewhere it has a tenth of the rate of ``bmm``. The answer is
    the same for all lengths, so that a beginning has the same bits whoever shares it.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and has_native_bfloat16() and not has_amx()


def _attend_tiles(
    output: torch.Tensor,
    tiles: TileBatch,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
) -> None:
    """Attend for a batch of tiles and write what they found into the output.

    Scores have the arithmetic of the model, as in transformers' eager code; query heads that share keys are the rows of
    one product.
    """
    (num_tiles, num_queries), num_keys = tiles.queries.shape, tiles.keys.shape[1]
    num_heads, key_heads, head_dim = query.shape[1], key.shape[1], value.shape[3]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    asking = _gather_tiles(query, tiles.queries).view(num_tiles, num_queries, key_heads, num_heads // key_heads, -1)
    asking = asking.permute(0, 2, 3, 1, 4).reshape(num_tiles * key_heads, -1, asking.shape[-1])
    seen, read = (
        _gather_tiles(states, tiles.keys).transpose(1, 2).reshape(num_tiles * key_heads, num_keys, -1)
        for states in (key, value)
    )
    scores = asking.new_empty(num_tiles * key_heads, asking.shape[1], num_keys)
    torch.baddbmm(scores, asking, seen.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    scores.view(num_tiles, -1, num_queries, num_keys).add_(tiles.mask[:, None])
    attended = torch.softmax(scores, dim=-1, out=scores) @ read
    attended = attended.view(num_tiles, num_heads, num_queries, -1)[..., :head_dim].transpose(1, 2)
    output[0].index_copy_(0, tiles.places, attended.flatten(0, 1).index_select(0, tiles.results))


def _gather_tiles(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return [tiles, positions, heads, head dimension] of [1, heads, tokens, head dimension]."""
    gathered = states[0].transpose(0, 1).index_select(0, positions.flatten())
    return _fill_heads(gathered.view(*positions.shape, *gathered.shape[1:]))


def _attend_slab(
    output: torch.Tensor,
    chunk: AttentionChunk,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> None:
    """Attend for the sequences of a slab, one by one, and write what their own tokens found into the output."""
    groups, head_dim = query.shape[1] // key.shape[1], value.shape[3]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    query = _fill_heads(_gather(query, chunk.queries))
    key, value = (_repeat(_fill_heads(_gather(states, chunk.keys)), groups) for states in (key, value))
    for span in chunk.sequences:
        queries, keys = slice(*span.queries), slice(*span.keys)
        part = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        attended = _attend(*part, span, packing, scaling, window, softcap)
        begin, end = span.own
        output[:, begin:end] = attended[:, :, : end - begin, :head_dim].transpose(1, 2)


def _gather(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the states at these positions of the row; a row's heads lie side by side in memory, and stay so."""
    return states.transpose(1, 2).index_select(1, positions).transpose(1, 2)


def _fill_heads(states: torch.Tensor) -> torch.Tensor:
    """Append zeros to the heads where that keeps the bits of a token; they change no score and no value."""
    missing = -states.shape[3] % HEAD_STEP
    if not missing or states.is_cuda or states.dtype == torch.float32:
        return states
    return pad(states, (0, missing))


def _repeat(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat keys or values that several query heads share, once for each of them."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    span: SequenceSpan,
    packing: Packing,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend causally within one sequence, from its own tokens on; [1, heads, queries, head dimension] in and out."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if softcap is None and span.num_shared == 0 and (window is None or num_keys <= window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    blocks = []
    for first in range(0, num_queries, QUERY_BLOCK):
        size = min(QUERY_BLOCK, num_queries - first)
        depth = span.num_shared + first
        oldest = 0 if window is None else max(0, depth - window + 1) // KEY_BLOCK * KEY_BLOCK
        newest = min(num_keys, -(-(depth + size) // BLOCK) * BLOCK)
        part = query[:, :, first : first + size], key[:, :, oldest:newest], value[:, :, oldest:newest]
        mask = _mask_of(packing, window, query.dtype, range(depth, depth + size), range(oldest, newest))
        if softcap is None:
            blocks.append(scaled_dot_product_attention(*part, attn_mask=mask, scale=scaling))
        else:
            blocks.append(_attend_softly(*part, mask, scaling, softcap))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _mask_of(packing: Packing, window: int | None, dtype: torch.dtype, queries: range, keys: range) -> torch.Tensor:
    """Return [queries, keys]: what is added to their scores, zero, or minus infinity where a key must not be seen.

    Keys that come later or have left the window are not seen. That depends on the distance alone, so all masks of a
    pass are parts of one band.
    """
    band = packing.bands.get((window, dtype))
    reach = max(branch.num_tokens for branch in packing.branches)
    if band is None:
        distance = torch.arange(min(QUERY_BLOCK, reach + BLOCK))[:, None] - torch.arange(-reach, QUERY_BLOCK + BLOCK)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        band = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        band = copy_to_device(band, packing.device)
        packing.bands[window, dtype] = band
    origin = reach - queries.start
    return band[: len(queries), origin + keys.start : origin + keys.stop]


def _attend_softly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with soft-capped scores, as no fused kernel of torch does; rounds where transformers' eager code does."""
    scores = (query @ key.transpose(2, 3)).mul_(scaling).div_(softcap).tanh_().mul_(softcap)
    weights = torch.softmax(scores.add_(mask), dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value


def _has_varlen_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's variable-length flash attention takes these tensors; else each sequence is attended to alone."""
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1]
        and head_dim % 8 == 0
        and head_dim <= LARGEST_FLASH_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """Attend to all sequences of a slab in one kernel; the same shapes as ``packed_attention``.

    Without shared beginnings the row itself is the one slab. The kernel (FlashAttention-2, from version 2.1) aligns a
    sequence's last query with its last key, in causality and windows alike.
    """
    plan = packing.cascade_plan
    if plan is not None and plan.holds_for(window):
        asking, known, read = (states[0].transpose(0, 1) for states in (query, key, value))
        return attend_cascade(asking, known, read, plan, scaling=scaling, window=window).unsqueeze(0)
    parts = []
    for chunk in packing.chunks:
        seen = (_gather(states, chunk.keys) if packing.shares else states for states in (key, value))
        borders = Borders(chunk.cu_seqlens_q, chunk.cu_seqlens_k, chunk.max_seqlen_q, chunk.max_seqlen_k)
        own = query[0, :, slice(*chunk.own)].transpose(0, 1)
        keys, values = (states[0].transpose(0, 1) for states in seen)
        parts.append(attend_varlen(own, keys, values, borders, scaling=scaling, window=window)[0])
    output = parts[0] if len(parts) == 1 else torch.cat(parts)
    return output.unsqueeze(0)


def no_mask(*, use_vmap: bool = False, **_kwargs: Any) -> None:
    """Build no mask: causality, windows and borders are kept by ``packed_attention``.

    Raises:
        PackingUnsupportedError: the model lays a pattern of its own over the mask, which transformers runs with vmap.
    """
    if use_vmap:
        raise PackingUnsupportedError("The model lays a pattern of its own over the attention mask")


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
