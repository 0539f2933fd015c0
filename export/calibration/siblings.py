"""The calibration scores of the component that compares completions of one prompt with each other."""

from __future__ import annotations

import numpy as np

from export.calibration.fit import sibling_deviations
from export.calibration.measured_parts import MeasuredItems
from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import ShrunkGaussian
from service.diagnostics.ood import MIN_GROUP

PSEUDO_GROUP = 6
"""Size of the simulated groups for data without prompts of `MIN_GROUP` or more completions."""

MIN_GROUPED_ITEMS = 200
"""Least number of items with siblings from which the component can be calibrated."""


def sibling_scores(siblings: ShrunkGaussian | None, items: MeasuredItems, seed: int) -> Scores | None:
    """Return each item's score relative to its siblings, NaN for items without any; None where the data are too few.

    Groups of `MIN_GROUP` or more completions of one prompt are used where there are enough of them. Otherwise groups
    are simulated from pairs of completions, see `_simulated_scores`.

    Args:
        siblings: Gaussian of deviations between completions of one prompt; None gives None.
        items: clean items.
        seed: seed of the simulated groups.
    """
    if siblings is None:
        return None
    _, members, sizes = np.unique(items.prompts, return_inverse=True, return_counts=True)
    scores = np.full(len(items.prompts), np.nan)
    if (sizes[members] >= MIN_GROUP).sum() >= MIN_GROUPED_ITEMS:
        for prompt in np.flatnonzero(sizes >= MIN_GROUP):
            indices = np.flatnonzero(members == prompt)
            scores[indices] = siblings.sibling_distance(items.statistics[indices])
        return scores
    has_siblings = sizes[members] > 1
    if has_siblings.sum() < MIN_GROUPED_ITEMS:
        return None
    scores[has_siblings] = _simulated_scores(siblings, items, seed)
    return scores


def _simulated_scores(siblings: ShrunkGaussian, items: MeasuredItems, seed: int) -> Scores:
    """Return the scores of items with siblings in simulated groups of `PSEUDO_GROUP`.

    Each item's deviation from its prompt's mean is put into a group with deviations from other prompts. Deviations are
    scaled to those of one completion about its prompt's mean, so the covariance is that of real groups.
    """
    deviations = sibling_deviations(siblings.standardised(items.statistics), items.prompts)
    rng = np.random.default_rng(seed)
    others = rng.integers(len(deviations), size=(len(deviations), PSEUDO_GROUP - 1))
    signs = rng.choice([-1.0, 1.0], size=(*others.shape, 1))
    centred = deviations - (signs * deviations[others]).mean(axis=1)
    centred *= np.sqrt((PSEUDO_GROUP - 1) / PSEUDO_GROUP)
    scores: Scores = np.einsum("ij,jk,ik->i", centred, siblings.precision, centred, optimize=True)
    return scores
