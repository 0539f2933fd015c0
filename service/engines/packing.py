"""The packed path: the sequences of a batch stand in one row, without padding, and attention runs per sequence.

The model's own transformers code runs unchanged; this module only gives it an attention function, registered through
``AttentionInterface``, and a mask function that builds nothing. It holds no state between passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from service.engines.base import BatchCost
from service.engines.classifier import Classifier
from service.engines.row_blocks import padded_rows

ATTENTION = "packed_rows"
"""The name under which transformers knows our attention and mask functions."""

FILLER_ID = 0
"""The token at the end of a row that belongs to nobody: any will do, its states are computed and never read."""

QUERY_BLOCK = 512
"""Queries that share one explicit mask or score matrix, so that none grows with the square of a sequence."""


VARLEN_SHARES_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether the variable-length kernel of this torch takes keys that query heads share; torch 2.11 does not."""

LARGEST_FLASH_HEAD = 256
"""Largest head dimension of torch's flash attention."""


class PackingUnsupportedError(RuntimeError):
    """The model asks something of attention that the packed path does not carry."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a packed row begin and end.

    ``bounds``: first and one-past-last position of each sequence. ``borders``: the same as int32 [sequences + 1] on the
    device, as variable-length kernels take them. ``num_filler``: tokens at the end of the row that belong to nobody.
    """

    bounds: tuple[tuple[int, int], ...]
    borders: torch.Tensor
    num_filler: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, *, row_blocks: bool = False) -> Packing:
        """Lay out sequences of these lengths one after another; with row blocks, up to a length that suits them."""
        borders = list(accumulate(lengths, initial=0))
        num_filler = padded_rows(borders[-1]) - borders[-1] if row_blocks else 0
        return cls(tuple(pairwise(borders)), torch.tensor(borders, dtype=torch.int32, device=device), num_filler)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(end - begin for begin, end in self.bounds)

    def position_ids(self) -> torch.Tensor:
        """Return int64 [1, tokens]: positions that start again at zero with each sequence; zeros for the filler."""
        counts = [torch.arange(end - begin) for begin, end in self.bounds]
        counts.append(torch.zeros(self.num_filler, dtype=torch.long))
        return torch.cat(counts).unsqueeze(0).to(self.borders.device)


class PackedForward:
    """Runs a batch as one row. What a batch costs is the sum of its tokens.

    On a CPU in half precision the linear layers multiply in row blocks, so that a reward does not depend on the batch.
    """

    name = "packed"
    cost: BatchCost = "packed"

    def __init__(self, classifier: Classifier) -> None:
        if classifier.linear_head is None:
            raise PackingUnsupportedError(f"{classifier.architecture} does not read its reward off one token's state")
        self._row_blocks = classifier.is_on_cpu and classifier.is_half_precision
        classifier.run_with(ATTENTION, row_blocks=self._row_blocks)
        self._classifier = classifier

    @torch.inference_mode()
    def rewards(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return one raw fp32 logit per row of token ids, in order."""
        classifier = self._classifier
        packing = Packing.of([len(row) for row in rows], classifier.device, row_blocks=self._row_blocks)
        ids = [token for row in rows for token in row] + [FILLER_ID] * packing.num_filler
        states = classifier.body(
            input_ids=classifier.token_tensor([ids]),
            position_ids=packing.position_ids(),
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]
        pooled = [begin + classifier.pooled_position(row) for row, (begin, _) in zip(rows, packing.bounds, strict=True)]
        return classifier.read_rewards(states[pooled])


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
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if packing is None or not causal:
        raise PackingUnsupportedError(
            f"{type(module).__name__} is not causal or does not pass on the layout of the row"
        )
    if softcap is None and _has_varlen_kernel(query, value):
        return _attend_varlen(query, key, value, packing, scaling, sliding_window), None

    key, value = _repeat_keys(key, query), _repeat_keys(value, query)
    output = query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))
    output[:, query.shape[2] - packing.num_filler :] = 0  # whatever stood there may be NaN, which slows down a CPU
    for begin, end in packing.bounds:
        part = query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end]
        output[:, begin:end] = _attend(*part, scaling, sliding_window, softcap).transpose(1, 2)
    return output, None


def _repeat_keys(states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat keys or values that several query heads share, once for each of them."""
    groups = query.shape[1] // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend causally within one sequence; [1, heads, tokens, head dimension] in and out."""
    length = query.shape[2]
    if softcap is None and (window is None or length <= window):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    blocks = []
    for first in range(0, length, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, length)
        oldest = 0 if window is None else max(0, first - window + 1)
        hidden = _hidden(range(first, last), range(oldest, last), window, query.device)
        part = query[:, :, first:last], key[:, :, oldest:last], value[:, :, oldest:last]
        if softcap is None:
            blocks.append(scaled_dot_product_attention(*part, attn_mask=~hidden, scale=scaling))
        else:
            blocks.append(_attend_softly(*part, hidden, scaling, softcap))
    return torch.cat(blocks, dim=2)


def _hidden(queries: range, keys: range, window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool [queries, keys]: which keys a query must not see, because they come later or have left its window."""
    distance = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
        keys.start, keys.stop, device=device
    )
    return distance < 0 if window is None else (distance < 0) | (distance >= window)


def _attend_softly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """Attend with soft-capped scores, as no fused kernel of torch does; rounds where transformers' eager code does."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)).mul_(scale).div_(softcap).tanh_().mul_(softcap)
    weights = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1, dtype=torch.float32)
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
    """Attend to all sequences in one kernel; the same shapes as ``packed_attention``."""
    kernel: Any = varlen_attn
    if VARLEN_SHARES_KEYS:
        kernel = partial(varlen_attn, enable_gqa=True)
    else:
        key, value = _repeat_keys(key, query), _repeat_keys(value, query)
    output: torch.Tensor = kernel(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing.borders,
        packing.borders,
        packing.longest,
        packing.longest,
        scale=scaling,
        # How far a query sees to the left and to the right of itself; -1: to the end.
        window_size=(-1 if window is None else window - 1, 0),
    )
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
