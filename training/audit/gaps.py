"""Distance and overlap of the reward distributions of chosen and rejected completions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.audit.intervals import Interval, bootstrap_interval
from training.audit.scored_pairs import ScoredPairs

EXPECTED_GAP = (0.5, 1.0)
"""Usual mean gap of a reward model on human preferences, in units of its reward."""

NUM_BINS = 50


@dataclass(frozen=True, slots=True)
class Gaps:
    """Figures of the two reward distributions."""

    mean_chosen: float
    mean_rejected: float

    mean_gap: Interval
    """Mean of chosen minus rejected reward."""

    standardised: float
    """``mean_gap`` divided by the standard deviation of the gap."""

    overlap: float
    """Area that the two normalised histograms have in common; 1 where they are equal."""


def measure_gaps(scored: ScoredPairs) -> Gaps:
    """Compute distance and overlap of the two reward distributions."""
    gaps = scored.gaps
    spread = float(gaps.std()) if len(gaps) else np.nan
    return Gaps(
        mean_chosen=float(scored.chosen.mean()),
        mean_rejected=float(scored.rejected.mean()),
        mean_gap=bootstrap_interval(lambda indices: float(gaps[indices].mean()), scored.prompts),
        standardised=float(gaps.mean() / spread) if spread > 0 else 0.0,
        overlap=_overlap(scored),
    )


def _overlap(scored: ScoredPairs) -> float:
    edges = np.histogram_bin_edges(np.concatenate([scored.chosen, scored.rejected]), NUM_BINS)
    chosen, rejected = (np.histogram(rewards, edges)[0] for rewards in (scored.chosen, scored.rejected))
    return float(np.minimum(chosen, rejected).sum() / len(scored))
