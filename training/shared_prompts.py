"""Computes the prompt of a preference pair once instead of twice, without changes to trainer, loss or model code.

The trainer passes the model a padded batch: the chosen sequences, then the rejected ones. The two sequences of a pair
have the prompt in common, which is most of their tokens. Each pair becomes one row (the chosen sequence, then what the
rejected one has after the common prefix), the model's body runs on these rows, and the hidden states are returned in
the layout of the padded batch. For causal models this is exact up to rounding: every token attends to the same tokens
at the same positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

PLAIN_CAUSAL_MODELS = frozenset({"llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
"""Architectures that accept a custom attention mask and attend to all preceding tokens."""


@dataclass(frozen=True, slots=True)
class PairRows:
    """A batch of pairs, one pair a row: the chosen sequence, then the rest of the rejected one."""

    ids: torch.Tensor
    """int64 [pair, token]."""

    positions: torch.Tensor
    """Position of each token in its sequence, int64 [pair, token]."""

    visible: torch.Tensor
    """Whether a query attends to a key, bool [pair, query, key]."""

    origins: torch.Tensor
    """Index of each token of the padded batch in its pair's row, int64 [2 pairs, token]; 0 for padding."""

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor) -> PairRows:
        """Build the rows of a right-padded batch, int64 [2 pairs, token]: the chosen, then the rejected sequences."""
        num_pairs = len(ids) // 2
        chosen, rejected = ids[:num_pairs], ids[num_pairs:]
        num_chosen, num_rejected = mask.sum(1).view(2, num_pairs).tolist()
        same = (chosen == rejected) & mask[:num_pairs].bool() & mask[num_pairs:].bool()
        num_common = same.long().cumprod(1).sum(1).tolist()

        length = max(c + r - s for c, r, s in zip(num_chosen, num_rejected, num_common, strict=True))
        rows = ids.new_zeros(num_pairs, length)
        positions = torch.zeros_like(rows)
        visible = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril().repeat(num_pairs, 1, 1)
        origins = torch.zeros_like(ids)
        for pair, (split, end, common) in enumerate(zip(num_chosen, num_rejected, num_common, strict=True)):
            own = end - common
            rows[pair, :split] = chosen[pair, :split]
            rows[pair, split : split + own] = rejected[pair, common:end]
            positions[pair, :split] = torch.arange(split)
            positions[pair, split : split + own] = torch.arange(common, end)
            visible[pair, split:, common:split] = False
            origins[pair, :split] = torch.arange(split)
            origins[num_pairs + pair, :common] = torch.arange(common)
            origins[num_pairs + pair, common:end] = torch.arange(split, split + own)
        return cls(rows, positions, visible, origins)

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the additive attention mask [pair, 1, query, key]."""
        mask = torch.zeros(self.visible.shape, dtype=dtype, device=self.ids.device)
        return mask.masked_fill(~self.visible, torch.finfo(dtype).min)[:, None]

    def scatter(self, states: torch.Tensor) -> torch.Tensor:
        """Return the rows' states [pair, token, hidden] in the layout of the padded batch, [2 pairs, token, hidden]."""
        pairs = torch.arange(len(self.ids), device=states.device).repeat(2)
        return states[pairs[:, None], self.origins]


@contextmanager
def prompts_shared(model: PreTrainedModel) -> Iterator[None]:
    """Make a causal classifier compute the prompt of each pair once within this context; its batches must be of pairs.

    Only plain causal attention supports this; any other model runs unchanged.
    """
    config = model.config.get_text_config()
    if config.model_type not in PLAIN_CAUSAL_MODELS or getattr(config, "sliding_window", None):
        yield
        return
    body = model.base_model
    plain_forward = body.forward

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        rows = PairRows.of(input_ids, attention_mask)
        output = plain_forward(
            input_ids=rows.ids,
            position_ids=rows.positions,
            attention_mask=rows.attention_mask(body.dtype),
            use_cache=False,
        )
        output.last_hidden_state = rows.scatter(output.last_hidden_state)
        return output

    body.forward = forward
    try:
        yield
    finally:
        del body.forward
