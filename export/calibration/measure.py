"""How well detectors tell hacks from clean completions, and how honest their p-values are.

Pure arithmetic on scores; higher is more unusual. Errors of rates count prompts, not items, since completions of one
prompt resemble each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kstest
from sklearn.metrics import roc_auc_score

from service.diagnostics.conformal import Scores, conformal_p

Ints = NDArray[np.int64]
NUM_FOLDS = 10


@dataclass(frozen=True, slots=True)
class Detection:
    """How well one set is told from clean items.

    ``fpr95``: share of clean items at or above the score that 95 percent of the set reach. ``tpr1``: share of the set
    above 99 percent of the clean items.
    """

    num_items: int
    auroc: float
    fpr95: float
    tpr1: float


@dataclass(frozen=True, slots=True)
class Rate:
    """A share of items, with a standard error that counts prompts as units. ``nominal``: what it should be."""

    nominal: float
    value: float
    standard_error: float
    num_items: int
    num_prompts: int

    @property
    def is_tolerable(self) -> bool:
        """Whether it is within three tenths of the nominal rate, or within three standard errors."""
        return abs(self.value - self.nominal) <= max(0.3 * self.nominal, 3 * self.standard_error)


@dataclass(frozen=True, slots=True)
class LengthTest:
    """Correlation of a reward with log length on items that its curve was not fitted to."""

    pooled: float
    within: float


def detection(clean: Scores, hacked: Scores) -> Detection:
    """Measure how well scores tell hacked items from clean ones."""
    labels = np.repeat([0, 1], [len(clean), len(hacked)])
    return Detection(
        num_items=len(hacked),
        auroc=float(roc_auc_score(labels, np.concatenate([clean, hacked]))),
        fpr95=float((clean >= np.quantile(hacked, 0.05)).mean()),
        tpr1=float((hacked > np.quantile(clean, 0.99)).mean()),
    )


def rate_of(hits: NDArray[np.bool_], prompts: Ints, nominal: float) -> Rate:
    """Return the share of hits, with the standard error of a ratio over prompts as clusters (Cochran 1977, 2.46)."""
    _, members = np.unique(prompts, return_inverse=True)
    num_prompts = int(members.max()) + 1
    value = float(hits.mean())
    residuals = np.bincount(members, hits - value)
    spread = num_prompts / max(1, num_prompts - 1) * float((residuals**2).sum())
    return Rate(nominal, value, math.sqrt(spread) / len(hits), len(hits), num_prompts)


def out_of_fold_p(scores: Scores, prompts: Ints, seed: int) -> Scores:
    """Return each item's conformal p-value among the items of other folds; folds hold whole prompts."""
    _, members = np.unique(prompts, return_inverse=True)
    folds = np.random.default_rng(seed).permutation(members.max() + 1) % NUM_FOLDS
    fold = folds[members]
    p_values = np.empty(len(scores))
    for place in range(NUM_FOLDS):
        own = fold == place
        if own.any():
            p_values[own] = conformal_p(np.sort(scores[~own]), scores[own])
    return p_values


def self_test(p_values: Scores, prompts: Ints) -> dict[str, Any]:
    """Return realised false-alarm rates at 1 and 5 percent, their design effect, and how uniform the p-values are."""
    rates = [rate_of(p_values <= nominal, prompts, nominal) for nominal in (0.01, 0.05)]
    wide = rates[1]
    binomial = wide.value * (1 - wide.value) / wide.num_items
    return {
        "rates": [asdict(rate) | {"is_tolerable": rate.is_tolerable} for rate in rates],
        "design_effect": wide.standard_error**2 / binomial if binomial else None,
        "ks_p": float(kstest(p_values, "uniform").pvalue),
    }


def length_test(rewards: Scores, log_lengths: Scores, prompts: Ints) -> LengthTest:
    """Correlate rewards with log lengths, over all items and about the means of their prompts."""
    return LengthTest(
        _correlation(rewards, log_lengths),
        _correlation(*(_centred(values, prompts) for values in (rewards, log_lengths))),
    )


def mean_over_sets(
    measure: Callable[[Detection], float], detections: Mapping[str, Detection], names: Sequence[str]
) -> float:
    """Return the mean of one figure over the named sets."""
    return float(np.mean([measure(detections[name]) for name in names]))


def _centred(values: Scores, prompts: Ints) -> Scores:
    _, members, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    means = np.bincount(members, values) / sizes
    return np.asarray((values - means[members])[sizes[members] > 1])


def _correlation(left: Scores, right: Scores) -> float:
    if len(left) < 3 or not np.ptp(left) or not np.ptp(right):
        return math.nan
    return float(np.corrcoef(left, right)[0, 1])
