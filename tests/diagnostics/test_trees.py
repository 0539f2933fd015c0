"""Boosted trees that are scored without walking, against the walk from node to node."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from service.diagnostics.trees import MAX_LEAVES, TreeEnsemble


def ensemble(rng: np.random.Generator, sizes: list[int], columns: int) -> TreeEnsemble:
    """Return trees with so many leaves each; each split of a leaf that was drawn makes two."""
    shape = (len(sizes), 2 * max(sizes) - 1)
    feature, threshold = np.zeros(shape, np.int16), np.zeros(shape, np.float32)
    children, value = np.zeros((2, *shape), np.int16), np.zeros(shape, np.float32)
    for tree, size in enumerate(sizes):
        leaves, num_nodes = [0], 1
        while len(leaves) < size:
            node = leaves.pop(rng.integers(len(leaves)))
            feature[tree, node], threshold[tree, node] = rng.integers(columns), rng.integers(-2, 3)
            children[:, tree, node] = num_nodes, num_nodes + 1
            leaves += [num_nodes, num_nodes + 1]
            num_nodes += 2
        for leaf in leaves:
            children[:, tree, leaf], value[tree, leaf] = leaf, rng.normal()
    return TreeEnsemble(np.arange(columns)[::-1].copy(), feature, threshold, children, value, 2 * max(sizes))


def walked(trees: TreeEnsemble, item: NDArray[np.float64]) -> float:
    added = []
    for tree in range(len(trees.feature)):
        node = 0
        while trees.children[0, tree, node] != node:
            goes_left = np.float32(item[trees.columns[trees.feature[tree, node]]]) <= trees.threshold[tree, node]
            node = trees.children[0 if goes_left else 1, tree, node]
        added.append(trees.value[tree, node])
    return float(np.array(added).sum(dtype=np.float64))


@pytest.mark.parametrize("num_items", [1, 3, 150])
def test_the_score_is_that_of_the_walk(num_items: int) -> None:
    """Trees of one to sixteen leaves of any shape; a value at a threshold goes left, one that is no number right."""
    rng = np.random.default_rng(num_items)
    trees = ensemble(rng, [1, 2, 3, 7, 12, MAX_LEAVES, MAX_LEAVES, 5], 4)
    statistics = rng.integers(-3, 4, size=(num_items, 4)).astype(np.float64)
    statistics[0, 1] = np.nan

    assert trees.score(statistics).tolist() == [walked(trees, item) for item in statistics]
    assert trees.score(statistics[:0]).shape == (0,)


def test_trees_that_cannot_be_scored_are_refused() -> None:
    """Trees with too many leaves, and nodes that lead back to the root."""
    with pytest.raises(ValueError, match="more than 16 leaves"):
        ensemble(np.random.default_rng(0), [MAX_LEAVES + 1], 2)
    endless = np.array([[[1, 0, 2]], [[2, 2, 2]]], np.int16)
    with pytest.raises(ValueError, match="no tree"):
        TreeEnsemble(
            np.arange(1),
            np.zeros((1, 3), np.int16),
            np.zeros((1, 3), np.float32),
            endless,
            np.zeros((1, 3), np.float32),
            3,
        )
