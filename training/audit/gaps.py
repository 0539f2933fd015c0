"""How far apart the rewards of chosen and rejected completions lie, and how much they overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from training.audit.intervals import Interval, bootstrap_interval
from training.audit.scored_pairs import ScoredPairs

EXPECTED_GAP = (0.5, 1.0)
"""Mean gap of an ordinary reward model on human preferences, in its own units."""

NUM_BINS = 50


@dataclass(frozen=True, slots=True)
class Gaps:
    """The two distributions of rewards.

    ``mean_gap``: chosen less rejected reward. ``standardised``: the same in standard deviations of the gap.
    ``overlap``: the area that the two histograms have in common, 1 if they are the same.
    """

    mean_chosen: float
    mean_rejected: float
    mean_gap: Interval
    standardised: float
    overlap: float


def measure_gaps(scored: ScoredPairs) -> Gaps:
    """Measure the distance of the two distributions of rewards."""
    gaps = scored.gaps
    spread = float(gaps.std()) if len(gaps) else np.nan
    return Gaps(
        mean_chosen=float(scored.chosen.mean()),
        mean_rejected=float(scored.rejected.mean()),
        mean_gap=bootstrap_interval(lambda rows: float(gaps[rows].mean()), scored.prompts),
        standardised=float(gaps.mean() / spread) if spread > 0 else 0.0,
        overlap=_overlap(scored),
    )


def _overlap(scored: ScoredPairs) -> float:
    borders = np.histogram_bin_edges(np.concatenate([scored.chosen, scored.rejected]), NUM_BINS)
    chosen, rejected = (np.histogram(rewards, borders)[0] for rewards in (scored.chosen, scored.rejected))
    return float(np.minimum(chosen, rejected).sum() / len(scored))
