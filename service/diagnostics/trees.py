"""Boosted trees, evaluated for a batch of items without walking from node to node.

The leaves of a tree are numbered from left to right. A node that sends an item to the right rules out the leaves of its
left subtree, and of the leaves that no node rules out the leftmost is the one that the item reaches (QuickScorer,
Lucchese et al., 2015). So all nodes of all trees are compared at once, and the leaves are bits of one number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.conformal import Scores
from service.diagnostics.detectors import Matrix

MAX_LEAVES = 16
"""Leaves of a tree, as bits of a uint16."""

_ALL_LEAVES = np.uint16(0xFFFF)
_CHUNK_ITEMS = 64
"""Items that are scored at once; more would not fit a cache."""


@dataclass(frozen=True, slots=True, eq=False)
class _Leaves:
    """The inner nodes of all trees, padded to the same number with nodes that rule out no leaf."""

    column: NDArray[np.intp]
    """Which of the ensemble's columns a node compares, [nodes x trees]."""

    threshold: NDArray[np.float32]
    """[nodes x trees, 1]"""

    left_out: NDArray[np.uint16]
    """The leaves that remain where an item goes right, as bits, [nodes x trees, 1]."""

    value: NDArray[np.float32]
    """What each leaf adds to the score, [leaves x trees]."""


@dataclass(frozen=True, eq=False)
class TreeEnsemble:
    """Gradient-boosted trees (Friedman, 2001): the score is the sum of one leaf of each tree.

    Raises:
        ValueError: a tree has more than `MAX_LEAVES` leaves, or nodes that make no tree.
    """

    columns: NDArray[np.int64] = field(repr=False)
    """Indices of the statistics that it reads, int64 [q]."""

    feature: NDArray[np.int16] = field(repr=False)
    """Index (within ``columns``) of the statistic that a node compares, int16 [trees, nodes]."""

    threshold: NDArray[np.float32] = field(repr=False)
    """A node goes left where the value is at most this, float32 [trees, nodes]."""

    children: NDArray[np.int16] = field(repr=False)
    """Left and right child; a leaf is its own child, int16 [2, trees, nodes]."""

    value: NDArray[np.float32] = field(repr=False)
    """What a leaf adds to the score, float32 [trees, nodes]."""

    depth: int
    """Largest number of steps from a root to a leaf."""

    def __post_init__(self) -> None:
        """Refuse trees that cannot be scored."""
        if not 0 <= int(self.children.min(initial=0)) <= int(self.children.max(initial=0)) < self.children.shape[2]:
            raise ValueError("a node has a child that there is not")
        _ = self._leaves

    def score(self, statistics: Matrix) -> Scores:
        """Return the sum of the leaves that each item reaches, float64 [items]."""
        values = statistics[:, self.columns].astype(np.float32)
        chunks = [
            self._score_chunk(values[start : start + _CHUNK_ITEMS]) for start in range(0, len(values), _CHUNK_ITEMS)
        ]
        return np.concatenate(chunks) if chunks else np.empty(0)

    def _score_chunk(self, values: NDArray[np.float32]) -> Scores:
        found, num_trees = self._leaves, len(self.feature)
        goes_left = np.ascontiguousarray(values.T).take(found.column, axis=0) <= found.threshold
        remaining = np.where(goes_left, _ALL_LEAVES, found.left_out).reshape(-1, num_trees, len(values))
        reached = np.bitwise_and.reduce(remaining, axis=0)
        leaf = np.bitwise_count(~reached & (reached - np.uint16(1))).astype(np.intp)  # trailing zeros
        added = found.value.take(leaf * num_trees + np.arange(num_trees)[:, None])
        total: Scores = np.ascontiguousarray(added.T).sum(axis=1, dtype=np.float64)
        return total

    @cached_property
    def _leaves(self) -> _Leaves:
        trees = [list(self._nodes_of(tree)) for tree in range(len(self.feature))]
        inner = [[node for node in nodes if node[1] < node[2]] for nodes in trees]
        leaves = [[node for node, begin, end in nodes if begin == end] for nodes in trees]
        if max(map(len, leaves), default=0) > MAX_LEAVES:
            raise ValueError(f"a tree has more than {MAX_LEAVES} leaves")
        shape = (max(map(len, inner), default=0), len(trees))
        column, threshold = np.zeros(shape, np.intp), np.full(shape, np.inf, np.float32)
        left_out = np.full(shape, _ALL_LEAVES, np.uint16)
        value = np.zeros((MAX_LEAVES, len(trees)), np.float32)
        for tree, nodes in enumerate(inner):
            for row, (node, begin, end) in enumerate(nodes):
                column[row, tree], threshold[row, tree] = self.feature[tree, node], self.threshold[tree, node]
                left_out[row, tree] = int(_ALL_LEAVES) & ~((1 << end) - (1 << begin))
            value[: len(leaves[tree]), tree] = self.value[tree, leaves[tree]]
        return _Leaves(column.ravel(), threshold.reshape(-1, 1), left_out.reshape(-1, 1), value.ravel())

    def _nodes_of(self, tree: int) -> Iterator[tuple[int, int, int]]:
        """Yield each node of a tree from left to right, with the first leaf of its left subtree and the leaf after it.

        Of a leaf the two are equal.
        """
        left, right = self.children[:, tree].tolist()
        waiting: list[tuple[int, int | None]] = [(0, None)]  # with the number of leaves before an entered node
        num_leaves = num_nodes = 0
        while waiting:
            node, begin = waiting.pop()
            num_nodes += 1
            if num_nodes > 3 * len(left) + 1:
                raise ValueError("the nodes are no tree")
            if left[node] == node:
                yield node, num_leaves, num_leaves
                num_leaves += 1
            elif begin is None:
                waiting += [(node, num_leaves), (left[node], None)]
            else:
                yield node, begin, num_leaves
                waiting.append((right[node], None))
