"""Selecting tokens and heads of query, key and value states for attention."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

HEAD_MULTIPLE = 32
"""In half precision on a CPU the head dimension is padded with zeros to a multiple of this. With other sizes the bits
of a token's result depend on the length of its sequence."""


def gather_tokens(states: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the states at these token indices; [1, heads, tokens, head dimension] in and out.

    The heads of a token are contiguous in memory, before and after.
    """
    return states.transpose(1, 2).index_select(1, indices).transpose(1, 2)


def pad_heads(states: torch.Tensor) -> torch.Tensor:
    """Pad the last dimension with zeros where ``HEAD_MULTIPLE`` requires it; that changes no score and no value."""
    missing = -states.shape[3] % HEAD_MULTIPLE
    if not missing or states.is_cuda or states.dtype == torch.float32:
        return states
    return pad(states, (0, missing))


def repeat_heads(states: torch.Tensor, groups: int) -> torch.Tensor:
    """Repeat each key or value head for the ``groups`` query heads that share it."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)
