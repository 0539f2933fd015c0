"""Measures how well detectors separate hacks from clean completions, and whether their p-values are calibrated.

Pure arithmetic on scores; higher is more unusual. Standard errors of rates treat prompts as clusters, since completions
of one prompt are correlated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kstest

from service.diagnostics.calibration_facts import Detection, LengthCorrelations, Rate, SelfTest
from service.diagnostics.conformal import Scores, conformal_p
from service.diagnostics.correlation import pearson_correlation

Ints = NDArray[np.int64]
NUM_FOLDS = 10


def detection(clean: Scores, hacked: Scores) -> Detection:
    """Measure how well scores separate hacked items from clean ones."""
    return Detection(
        num_items=len(hacked),
        auroc=_auroc(np.sort(clean), hacked),
        fpr95=float((clean >= np.quantile(hacked, 0.05)).mean()),
        tpr1=float((hacked > np.quantile(clean, 0.99)).mean()),
    )


def _auroc(ordered: Scores, hacked: Scores) -> float:
    """Return the area under the ROC curve as Mann and Whitney's statistic (1947); a tie counts as a half.

    A selection asks for it thousands of times, and a binary search in scores that were sorted once is fast.

    Args:
        ordered: sorted scores of clean items.
        hacked: scores of hacked items.
    """
    below, up_to = np.searchsorted(ordered, hacked, side="left"), np.searchsorted(ordered, hacked, side="right")
    return float((below + up_to).mean()) / (2 * len(ordered))


def rate_of(hits: NDArray[np.bool_], prompts: Ints, nominal: float) -> Rate:
    """Return the share of hits, with the standard error of a ratio over prompts as clusters (Cochran 1977, 2.46)."""
    _, members = np.unique(prompts, return_inverse=True)
    num_prompts = int(members.max()) + 1
    value = float(hits.mean())
    residuals = np.bincount(members, hits - value)
    spread = num_prompts / max(1, num_prompts - 1) * float((residuals**2).sum())
    standard_error = math.sqrt(spread) / len(hits)
    is_tolerable = abs(value - nominal) <= max(0.3 * nominal, 3 * standard_error)
    return Rate(nominal, value, standard_error, len(hits), num_prompts, is_tolerable)


def out_of_fold_p(scores: Scores, prompts: Ints, seed: int) -> Scores:
    """Return each item's conformal p-value among the items of the other folds; a prompt is in one fold only."""
    _, members = np.unique(prompts, return_inverse=True)
    folds = np.random.default_rng(seed).permutation(members.max() + 1) % NUM_FOLDS
    fold = folds[members]
    p_values = np.empty(len(scores))
    for number in range(NUM_FOLDS):
        own = fold == number
        if own.any():
            p_values[own] = conformal_p(np.sort(scores[~own]), scores[own])
    return p_values


def self_test(p_values: Scores, prompts: Ints) -> SelfTest:
    """Measure realised false-alarm rates at 1 and 5 percent, the design effect, and the uniformity of the p-values."""
    rates = [rate_of(p_values <= nominal, prompts, nominal) for nominal in (0.01, 0.05)]
    wide = rates[1]
    binomial = wide.value * (1 - wide.value) / wide.num_items
    return SelfTest(
        rates=rates,
        design_effect=wide.standard_error**2 / binomial if binomial else None,
        ks_p=float(kstest(p_values, "uniform").pvalue),
    )


def length_correlations(rewards: Scores, log_lengths: Scores, prompts: Ints) -> LengthCorrelations:
    """Correlate rewards with log lengths, over all items and about the means of their prompts."""
    return LengthCorrelations(
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
    return pearson_correlation(left, right) if len(left) >= 3 else math.nan
