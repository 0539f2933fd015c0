"""The padded path: the sequences of a batch stand below each other, filled up on the right to the longest one.

It serves architectures whose attention or head the packed path cannot carry, with transformers' own attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from service.engines.base import BatchCost
from service.engines.classifier import Classifier


class PaddedForward:
    """Runs a batch as a rectangle. What a batch costs is its longest sequence times its count.

    On a CPU in half precision each row is a rectangle of its own: filling would choose other kernels, whose rounding
    moves a reward by hundredths, and on a CPU it saves little time.
    """

    name = "padded"
    cost: BatchCost = "padded"

    def __init__(self, classifier: Classifier) -> None:
        classifier.run_with(classifier.plain_attention)
        self._classifier = classifier
        self._fills_up = not (classifier.is_on_cpu and classifier.is_half_precision)

    @torch.inference_mode()
    def rewards(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return one raw fp32 logit per row of token ids, in order."""
        if self._fills_up:
            return self._rectangle(rows)
        return [reward for row in rows for reward in self._rectangle([row])]

    def _rectangle(self, rows: Sequence[Sequence[int]]) -> list[float]:
        classifier = self._classifier
        pooled = [classifier.pooled_position(row) for row in rows]
        longest = max(len(row) for row in rows)
        # What stands in the filling is never seen; where no pad token is defined any token will do.
        filler = classifier.pad_token_id or 0
        inputs = {
            "input_ids": classifier.token_tensor([[*row, *[filler] * (longest - len(row))] for row in rows]),
            "attention_mask": classifier.token_tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }
        if classifier.linear_head is None:
            rewards: list[float] = classifier.model(**inputs).logits[:, 0].tolist()
            return rewards
        states = classifier.body(**inputs, use_cache=False).last_hidden_state
        return classifier.read_rewards(states[range(len(rows)), pooled])
