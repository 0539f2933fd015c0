"""Attention of one sequence after the other with torch's fused kernel, or in matrix products where scores are capped.

This is how CPUs run attention where batched tiles are not faster, and any device where no variable-length kernel fits.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from service.engines.attention.call import AttentionCall
from service.engines.attention.gather import gather_tokens, pad_heads, repeat_heads
from service.engines.attention.layout import BLOCK, AttentionChunk, PackedLayout, SequenceSpan
from service.engines.devices.staging import copy_to_device

QUERY_BLOCK = 512
"""Queries that share one explicit mask or score matrix, so that none grows with the square of a sequence."""

KEY_BLOCK = 512
"""Keys outside a sliding window are left out in multiples of this, which is the block of keys of torch's kernel: so the
rounding of the others does not change."""


def attend_chunk(output: torch.Tensor, chunk: AttentionChunk, call: AttentionCall) -> None:
    """Compute attention for the sequences of a chunk, one by one, and write the results of their own tokens.

    Args:
        output: [1, tokens, heads, value dimension], written in place.
        chunk: a chunk of the call's layout.
        call: its keys and values are followed by the cached ones.
    """
    groups, head_dim = call.query.shape[1] // call.key.shape[1], call.value.shape[3]
    query = pad_heads(gather_tokens(call.query, chunk.queries))
    key, value = (
        repeat_heads(pad_heads(gather_tokens(states, chunk.keys)), groups) for states in (call.key, call.value)
    )
    for span in chunk.sequences:
        queries, keys = slice(*span.queries), slice(*span.keys)
        own = query[:, :, queries], key[:, :, keys], value[:, :, keys]
        if call.layout.is_batch_invariant:  # a library may choose its kernel by strides, too
            own = own[0].contiguous(), own[1].contiguous(), own[2].contiguous()
        attended = _attend_sequence(*own, span, call)
        begin, end = span.own
        output[:, begin:end] = attended[:, :, : end - begin, :head_dim].transpose(1, 2)


def _attend_sequence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: SequenceSpan, call: AttentionCall
) -> torch.Tensor:
    """Attend causally from the own tokens of one sequence; [1, heads, queries, head dimension] in and out."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    window, softcap, scaling = call.window, call.softcap, call.scale
    if softcap is None and span.num_shared == 0 and (window is None or num_keys <= window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    blocks = []
    for first in range(0, num_queries, QUERY_BLOCK):
        size = min(QUERY_BLOCK, num_queries - first)
        position = span.num_shared + first
        first_key = 0 if window is None else max(0, position - window + 1) // KEY_BLOCK * KEY_BLOCK
        end_key = min(num_keys, -(-(position + size) // BLOCK) * BLOCK)
        part = query[:, :, first : first + size], key[:, :, first_key:end_key], value[:, :, first_key:end_key]
        mask = _mask_of(call.layout, window, query.dtype, range(position, position + size), range(first_key, end_key))
        if softcap is None:
            blocks.append(scaled_dot_product_attention(*part, attn_mask=mask, scale=scaling))
        else:
            blocks.append(_attend_with_softcap(*part, mask, scaling, softcap))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _mask_of(layout: PackedLayout, window: int | None, dtype: torch.dtype, queries: range, keys: range) -> torch.Tensor:
    """Return [queries, keys], added to the scores: zero, or minus infinity where the key is later or out of the window.

    The values depend on the distance between query and key alone, so the masks of all layers of a pass with one window
    are slices of one banded matrix, which is built once.
    """
    mask = layout.window_masks.get((window, dtype))
    reach = max(sequence.num_tokens for sequence in layout.sequences)
    if mask is None:
        distance = torch.arange(min(QUERY_BLOCK, reach + BLOCK))[:, None] - torch.arange(-reach, QUERY_BLOCK + BLOCK)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        mask = copy_to_device(mask, layout.device)
        layout.window_masks[window, dtype] = mask
    origin = reach - queries.start
    own = mask[: len(queries), origin + keys.start : origin + keys.stop]
    return own.contiguous() if layout.is_batch_invariant else own


def _attend_with_softcap(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with soft-capped scores, which no fused kernel of torch supports.

    Rounds where the eager attention of transformers' Gemma 2 does (Gemma Team, 2024, section 2: logit soft-capping).
    """
    scores = (query @ key.transpose(2, 3)).mul_(scaling).div_(softcap).tanh_().mul_(softcap)
    weights = torch.softmax(scores.add_(mask), dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value
