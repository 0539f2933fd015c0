"""Computes the prompt of a preference pair once instead of twice, without a change to trainer, loss or model code.

The trainer hands the model a padded batch: the chosen sequences, then the rejected ones. Each pair has its prompt in
common, which is most of its tokens. We put each pair into one row (the chosen sequence, then what the rejected one has
of its own), let the model's body run on those rows, and hand back the hidden states in the layout that the trainer
expects. Exact for causal models up to rounding: a token sees the same tokens at the same positions as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

PLAIN_CAUSAL_MODELS = frozenset({"llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
"""Architectures that take a mask of our own and attend to everything before a token."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """A batch of pairs, one pair a row.

    ``ids``, ``positions``: int64 [pair, token]. ``visible``: bool [pair, query, key]. ``origins``: int64
    [2 pairs, token], the place in its pair's row of each token of the padded batch, 0 where that is padding.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    origins: torch.Tensor

    @classmethod
    def of(cls, ids: torch.Tensor, mask: torch.Tensor) -> SharedRows:
        """Lay out a right-padded batch, int64 [2 pairs, token]: the chosen sequences, then the rejected ones."""
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
        for pair, (border, end, common) in enumerate(zip(num_chosen, num_rejected, num_common, strict=True)):
            own = end - common
            rows[pair, :border] = chosen[pair, :border]
            rows[pair, border : border + own] = rejected[pair, common:end]
            positions[pair, :border] = torch.arange(border)
            positions[pair, border : border + own] = torch.arange(common, end)
            visible[pair, border:, common:border] = False
            origins[pair, :border] = torch.arange(border)
            origins[num_pairs + pair, :common] = torch.arange(common)
            origins[num_pairs + pair, common:end] = torch.arange(border, border + own)
        return cls(rows, positions, visible, origins)

    def attention_mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the mask that is added to the attention scores: [pair, 1, query, key]."""
        mask = torch.zeros(self.visible.shape, dtype=dtype, device=self.ids.device)
        return mask.masked_fill(~self.visible, torch.finfo(dtype).min)[:, None]

    def scatter(self, states: torch.Tensor) -> torch.Tensor:
        """Bring states [pair, token, hidden] of the rows back to the padded batch: [2 pairs, token, hidden]."""
        pairs = torch.arange(len(self.ids), device=states.device).repeat(2)
        return states[pairs[:, None], self.origins]


@contextmanager
def prompts_shared(model: PreTrainedModel) -> Iterator[None]:
    """Within this context a causal classifier computes the prompt of each pair once; its batches must hold pairs.

    Only plain causal attention can be shared in this way; any other model runs as it always does.
    """
    config = model.config.get_text_config()
    if config.model_type not in PLAIN_CAUSAL_MODELS or getattr(config, "sliding_window", None):
        yield
        return
    body = model.base_model
    plain_forward = body.forward

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        rows = SharedRows.of(input_ids, attention_mask)
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
