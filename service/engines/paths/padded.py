"""The padded path: the sequences of a batch stand below each other, filled up on the right to the longest one.

It serves architectures whose attention or head the packed path cannot carry, with transformers' own attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from service.engines.base import BatchCost, EngineOutput
from service.engines.kernels.bindings import Kernels
from service.engines.model.classifier import Classifier
from service.engines.model.taps import Spot, StateQuery
from service.engines.rewiring import rewire


class PaddedForward:
    """Runs a batch as a rectangle. What a batch costs is its longest sequence times its count.

    On a CPU in half precision each row is a rectangle of its own: filling would choose other kernels, whose rounding
    moves a reward by hundredths, and on a CPU it saves little time.
    """

    name = "padded"
    cost: BatchCost = "padded"
    min_shared_prefix_tokens: int | None = None
    kernels: Kernels | None = None
    caches_prefixes = False

    def __init__(self, classifier: Classifier) -> None:
        rewire(classifier, classifier.plain_attention)
        self._classifier = classifier
        self._fills_up = not (classifier.is_on_cpu and classifier.is_half_precision)

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[tuple[int, ...]],
        query: StateQuery | None = None,
        prompts: Sequence[int | None] | None = None,
    ) -> EngineOutput:
        """Score rows of token ids in one pass; see ``ForwardPath.run``. Nothing is kept."""
        del prompts
        query = query or StateQuery((), ())
        readings = query.readings
        if self._fills_up:
            rewards, states = self._rectangle(rows, StateQuery(query.taps, readings))
            return EngineOutput(rewards, [0] * len(rows), _on_host(states))
        rewards, parts = [], []
        for index, row in enumerate(rows):
            own = tuple((0, first) for owner, first in readings if owner == index)
            reward, part = self._rectangle([row], StateQuery(query.taps if own else (), own))
            rewards += reward
            parts.append(part)
        return EngineOutput(rewards, [0] * len(rows), _on_host(_in_order(readings, parts)))

    def clear_cache(self) -> None:
        """Nothing is kept."""

    def num_cached_tokens(self, row: tuple[int, ...], first_wanted: int | None) -> int:
        """Return zero: nothing is kept."""
        del row, first_wanted
        return 0

    def _rectangle(self, rows: Sequence[tuple[int, ...]], query: StateQuery) -> tuple[list[float], torch.Tensor | None]:
        classifier = self._classifier
        longest = max(len(row) for row in rows)
        # What stands in the filling is never seen; where no pad token is defined any token will do.
        filler = classifier.pad_token_id or 0
        inputs = {
            "input_ids": classifier.token_tensor([[*row, *[filler] * (longest - len(row))] for row in rows]),
            "attention_mask": classifier.token_tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        }
        pooled = [classifier.read_position(row) for row in rows]
        spots = [
            Spot(row, pooled[row], ((first if first < len(rows[row]) else 0, len(rows[row])),))
            for row, first in query.readings
        ]
        with classifier.tapped(query.taps, spots) as tapped:
            if classifier.linear_head is None:
                rewards: list[float] = classifier.model(**inputs).logits[:, 0].tolist()
            else:
                states = classifier.body(**inputs, use_cache=False).last_hidden_state
                rewards = classifier.read_rewards(states[range(len(rows)), pooled])
        return rewards, tapped.stacked()


def _in_order(readings: Sequence[tuple[int, int]], parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Put the readings of single rows, each in the order of its own, back into their common order."""
    of_row = [iter(()) if part is None else iter(part) for part in parts]
    found = [next(of_row[row]) for row, _ in readings]
    return torch.stack(found) if found else None


def _on_host(states: torch.Tensor | None) -> NDArray[np.float32] | None:
    return None if states is None else states.cpu().numpy()
