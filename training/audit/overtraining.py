"""Compares accuracy, gap and loss on training pairs with those on held-out pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.audit.accuracy import wins_of
from training.audit.intervals import Interval, bootstrap_interval, share_interval
from training.audit.scored_pairs import IntArray, ScoredPairs
from training.bradley_terry import bradley_terry_loss

TOLERATED_LEAD = 0.05
"""Tolerated difference in accuracy; for every trained model it is above zero."""


@dataclass(frozen=True, slots=True)
class Overtraining:
    """Figures on training pairs and on held-out pairs."""

    num_train_pairs: int
    train_accuracy: Interval
    held_out_accuracy: Interval

    lead: Interval
    """``train_accuracy`` minus ``held_out_accuracy``."""

    train_gap: float
    """Mean of chosen minus rejected reward."""

    held_out_gap: float

    train_loss: float
    """Mean Bradley-Terry loss in nats."""

    held_out_loss: float

    @property
    def is_overtrained(self) -> bool:
        """Whether ``lead`` is above ``TOLERATED_LEAD``, at the lower end of its confidence interval."""
        return self.lead.low > TOLERATED_LEAD

    @property
    def is_excluded(self) -> bool:
        """Whether ``lead`` is at most ``TOLERATED_LEAD``, at the upper end of its confidence interval."""
        return self.lead.high <= TOLERATED_LEAD


def measure_overtraining(held_out: ScoredPairs, trained: ScoredPairs) -> Overtraining:
    """Compare the rewards of training pairs with those of held-out pairs."""
    return Overtraining(
        num_train_pairs=len(trained),
        train_accuracy=share_interval(wins_of(trained.gaps), trained.prompts),
        held_out_accuracy=share_interval(wins_of(held_out.gaps), held_out.prompts),
        lead=_lead(held_out, trained),
        train_gap=float(trained.gaps.mean()),
        held_out_gap=float(held_out.gaps.mean()),
        train_loss=bradley_terry_loss(trained.chosen, trained.rejected).mean,
        held_out_loss=bradley_terry_loss(held_out.chosen, held_out.rejected).mean,
    )


def _lead(held_out: ScoredPairs, trained: ScoredPairs) -> Interval:
    """Bootstrap both sets at once; no prompt of one is a prompt of the other."""
    wins = np.concatenate([wins_of(trained.gaps), wins_of(held_out.gaps)])
    is_trained = np.arange(len(wins)) < len(trained)
    prompts = np.concatenate([trained.prompts, held_out.prompts + trained.prompts.max() + 1])

    def lead(indices: IntArray) -> float:
        train, other = wins[indices][is_trained[indices]], wins[indices][~is_trained[indices]]
        return float(train.mean() - other.mean()) if len(train) and len(other) else np.nan

    return bootstrap_interval(lead, prompts)
