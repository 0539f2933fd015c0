"""Whether the model knows its training pairs better than others: accuracy and gap, trained on against held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.audit.accuracy import wins_of
from training.audit.intervals import Interval, bootstrap_interval, share_interval
from training.audit.scored_pairs import IntArray, ScoredPairs
from training.bradley_terry import bradley_terry_loss

TOLERATED_LEAD = 0.05
"""Accuracy by which training pairs may be ahead; every trained model is a little."""


@dataclass(frozen=True, slots=True)
class Overtraining:
    """``lead``: accuracy on training pairs less that on held-out ones. ``*_loss``: mean Bradley-Terry loss in nats."""

    num_train_pairs: int
    train_accuracy: Interval
    held_out_accuracy: Interval
    lead: Interval
    train_gap: float
    held_out_gap: float
    train_loss: float
    held_out_loss: float

    @property
    def memorises(self) -> bool:
        """Whether the lead is above ``TOLERATED_LEAD``, beyond doubt."""
        return self.lead.low > TOLERATED_LEAD


def measure_overtraining(held_out: ScoredPairs, trained: ScoredPairs) -> Overtraining:
    """Compare the rewards of pairs that were trained on with those of pairs that were not."""
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
    """Both sets are resampled together, each over prompts of its own."""
    wins = np.concatenate([wins_of(trained.gaps), wins_of(held_out.gaps)])
    is_trained = np.arange(len(wins)) < len(trained)
    prompts = np.concatenate([trained.prompts, held_out.prompts + trained.prompts.max() + 1])

    def lead(rows: IntArray) -> float:
        mine, others = wins[rows][is_trained[rows]], wins[rows][~is_trained[rows]]
        return float(mine.mean() - others.mean()) if len(mine) and len(others) else np.nan

    return bootstrap_interval(lead, prompts)
