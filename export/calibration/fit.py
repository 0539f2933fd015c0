"""Fits the components of a calibration to scored items: covariances, trees, the Laplace factor.

Pure: arrays in, the service's detectors out. The caller decides which items each fit may use, because everything fitted
here is biased on the items that it was fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import ledoit_wolf
from sklearn.ensemble import GradientBoostingClassifier

from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix, ShrunkGaussian
from service.diagnostics.states import LaplaceFactor, StateForm
from service.diagnostics.trees import TreeEnsemble

MAX_AXES = 64
MIN_ITEMS_PER_AXIS = 4
NUM_TREES = 500
LEARNING_RATE = 0.07
MAX_LEAVES = 12


def fit_state_form(states: NDArray[np.float32]) -> StateForm:
    """Fit the factored form of a tap's shrunk covariance to states [items, hidden].

    The largest eigenvalues and the mean of the others are shrunk towards the mean variance, by the weight that Ledoit
    and Wolf (2004) found optimal for the full matrix.
    """
    num_items, hidden = states.shape
    mean = states.mean(axis=0, dtype=np.float64)
    centred = states.astype(np.float64) - mean
    covariance, shrinkage = ledoit_wolf(centred, assume_centered=True)
    num_axes = max(1, min(MAX_AXES, num_items // MIN_ITEMS_PER_AXIS, hidden - 1))
    values, vectors = np.linalg.eigh(covariance)  # the shrunk matrix has the axes of the sample's
    leading = slice(hidden - 1, hidden - 1 - num_axes, -1)
    rest = float(np.maximum(values[: hidden - num_axes], 0).mean())
    # In directions that no item spans, the shrunk eigenvalue is the contribution of the shrinkage target alone.
    floor = max(rest, float(shrinkage) * float(values.mean()), 1e-12)
    return StateForm(
        mean.astype(np.float32),
        np.ascontiguousarray(vectors[:, leading]).astype(np.float32),
        np.maximum(values[leading], 1e-12).astype(np.float32),
        floor,
    )


def fit_gaussian(statistics: Matrix, columns: Sequence[int]) -> ShrunkGaussian:
    """Fit a shrunk Gaussian to some columns of statistics [items, all]."""
    chosen = np.array(columns, np.int64)
    values = statistics[:, chosen]
    sd = values.std(axis=0)
    gaussian = ShrunkGaussian(chosen, values.mean(axis=0), np.where(sd > 0, sd, 1.0), np.eye(len(chosen)))
    covariance, _ = ledoit_wolf(gaussian.standardised(statistics))
    return ShrunkGaussian(chosen, gaussian.mean, gaussian.sd, np.linalg.inv(covariance))


def fit_siblings(statistics: Matrix, prompts: NDArray[np.int64], like: ShrunkGaussian) -> ShrunkGaussian:
    """Fit the Gaussian of deviations between completions of one prompt, with the columns and scales of another.

    Args:
        statistics: float64 [items, all].
        prompts: number of each item's prompt, int64 [items]; some must occur twice.
        like: Gaussian whose columns and scales are used.
    """
    deviations = sibling_deviations(like.standardised(statistics), prompts)
    covariance, _ = ledoit_wolf(np.concatenate([deviations, -deviations]), assume_centered=True)
    return ShrunkGaussian(like.columns, like.mean, like.sd, np.linalg.inv(covariance))


def sibling_deviations(standardised: Matrix, prompts: NDArray[np.int64]) -> Matrix:
    """Return sqrt(n / (n - 1)) times each item's deviation from its prompt's mean, for prompts with n >= 2 items."""
    _, members, sizes = np.unique(prompts, return_inverse=True, return_counts=True)
    sums = np.zeros((len(sizes), standardised.shape[1]))
    np.add.at(sums, members, standardised)
    has_siblings = sizes[members] > 1
    size = sizes[members][has_siblings][:, None]
    deviations = standardised[has_siblings] - sums[members][has_siblings] / size
    return np.asarray(np.sqrt(size / (size - 1)) * deviations)


def fit_trees(
    clean: Matrix, hacked: Matrix, columns: Sequence[int], seed: int, weights: Scores | None = None
) -> TreeEnsemble:
    """Fit boosted trees that separate hacked from clean statistics; both classes have the same total weight.

    Args:
        clean: float64 [clean items, all].
        hacked: float64 [hacked items, all].
        columns: indices of the statistics to read.
        seed: seed of the samples of items and of statistics.
        weights: of the hacked items among each other, float64 [hacked items]; None: all weigh the same.
    """
    chosen = np.array(columns, np.int64)
    values = np.concatenate([clean, hacked])[:, chosen]
    labels = np.repeat([0, 1], [len(clean), len(hacked)])
    own = np.ones(len(hacked)) if weights is None else weights
    balanced = np.concatenate([np.full(len(clean), 0.5 / len(clean)), 0.5 * own / own.sum()]) * len(values)
    model = GradientBoostingClassifier(
        n_estimators=NUM_TREES, learning_rate=LEARNING_RATE, max_leaf_nodes=MAX_LEAVES, max_depth=None,
        min_samples_leaf=8, subsample=0.7, max_features=0.3, random_state=seed,
    )  # fmt: skip
    model.fit(values, labels, sample_weight=balanced)
    return _as_ensemble(chosen, [step[0].tree_ for step in model.estimators_], model.learning_rate)


def _as_ensemble(columns: NDArray[np.int64], trees: Sequence[Any], learning_rate: float) -> TreeEnsemble:
    shape = (len(trees), max(tree.node_count for tree in trees))
    feature, threshold = np.zeros(shape, np.int16), np.zeros(shape, np.float32)
    children, value = np.zeros((2, *shape), np.int16), np.zeros(shape, np.float32)
    for index, tree in enumerate(trees):
        own = slice(0, tree.node_count)
        nodes = np.arange(tree.node_count)
        is_leaf = tree.children_left < 0
        feature[index, own] = np.where(is_leaf, 0, tree.feature)
        # Rounded down, so that a float32 value is at most the float64 threshold exactly when it is at most this one.
        threshold[index, own] = _rounded_down(tree.threshold)
        children[0, index, own] = np.where(is_leaf, nodes, tree.children_left)
        children[1, index, own] = np.where(is_leaf, nodes, tree.children_right)
        value[index, own] = np.where(is_leaf, learning_rate * tree.value[:, 0, 0], 0)
    return TreeEnsemble(columns, feature, threshold, children, value, max(tree.max_depth for tree in trees))


def _rounded_down(values: Scores) -> NDArray[np.float32]:
    rounded = values.astype(np.float32)
    return np.where(rounded > values, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def fit_laplace(
    states: NDArray[np.float32], rewards: Scores, prompts: NDArray[np.int64], form: StateForm
) -> LaplaceFactor | None:
    """Fit the last-layer Laplace factor to pairs of completions of one prompt; None where there are none.

    ``H = prior I + sum s (1 - s) d d'`` over pairs, d the difference of their states and s the probability that the
    model gives to one of them (Bradley-Terry likelihood; cf. arXiv 2602.24040). The prior precision is the mean squared
    distance of the states over the variance of the rewards, so that a head drawn from the prior gives rewards of that
    variance.

    Args:
        states: float32 [items, hidden], as the head reads them.
        rewards: float64 [items].
        prompts: number of each item's prompt, int64 [items].
        form: axes on which the factor is computed.
    """
    on_axes, squared, _ = form.coordinates(states)
    order = np.argsort(prompts, kind="stable")
    same = prompts[order][1:] == prompts[order][:-1]
    first, second = order[:-1][same], order[1:][same]
    if not len(first):
        return None
    differences = on_axes[first] - on_axes[second]
    margin = rewards[first] - rewards[second]
    weight = 1.0 / (2.0 + np.exp(-np.abs(margin)) + np.exp(np.abs(margin)))  # sigma (1 - sigma)
    prior = float(squared.mean() / max(rewards.var(), 1e-12))
    precision = prior * np.eye(on_axes.shape[1]) + (differences * weight[:, None]).T @ differences
    return LaplaceFactor(form, np.linalg.cholesky(precision), prior)
