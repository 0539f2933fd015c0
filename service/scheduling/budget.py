"""The budget of one forward pass, and the cost of a batch. Pure arithmetic on lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.records import BatchCost


@dataclass(frozen=True, slots=True)
class BatchBudget:
    """The limits of one forward pass.

    A single sequence with more tokens than ``max_tokens`` is legal and gets a pass of its own.
    """

    cost: BatchCost
    """How the engine computes the cost of a batch: see `batch_cost`."""

    max_tokens: int
    """Tokens that one pass may compute."""

    max_sequences: int
    """Sequences in one pass."""

    def halved(self) -> BatchBudget:
        """Return a budget of half the tokens, at least one token: then every sequence gets a pass of its own."""
        return replace(self, max_tokens=max(self.max_tokens // 2, 1))


def batch_cost(lengths: Sequence[int], cost: BatchCost) -> int:
    """Return the tokens that a pass over sequences of these lengths computes.

    ``packed``: the sum of the lengths. ``padded``: longest x count. Zero for no sequences.
    """
    if not lengths:
        return 0
    return sum(lengths) if cost == "packed" else max(lengths) * len(lengths)
