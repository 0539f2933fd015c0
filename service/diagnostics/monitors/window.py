"""The sufficient statistics of a stretch of the stream, which merge exactly over buckets of time and over replicas.

Pure: items in, statistics out; what the statistics say is read off in ``report`` and ``alarms``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.monitors.moments import Moments, WithinMoments
from service.diagnostics.monitors.observation import Column, ObservedItems

STYLE_COLUMNS: tuple[Column, ...] = (
    "reward",
    "log_tokens",
    "headers",
    "list_items",
    "bold",
    "emoji",
    "hedges",
    "flattery",
)
"""The vector of the style regression: the reward, then what it should not depend on."""

TELLS: tuple[Column, ...] = ("markdown", "emoji", "hedges", "flattery", "repeat4")
"""Style signals that are watched by the share of items with more of them than 95 percent of the reference have."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """How items cluster by prompt: number of items, of prompts, and the sum of the squares of the prompts' items."""

    items: int = 0
    prompts: int = 0
    squares: int = 0

    @classmethod
    def of(cls, prompts: NDArray[np.int64]) -> Clusters:
        """Count the items [n] of each prompt."""
        sizes = np.unique(prompts, return_counts=True)[1]
        return cls(len(prompts), len(sizes), int((sizes * sizes).sum()))

    def merged(self, other: Clusters) -> Clusters:
        """Return the counts of both, which have no prompt in common."""
        return Clusters(self.items + other.items, self.prompts + other.prompts, self.squares + other.squares)

    def design_effect(self, intraclass: float) -> float:
        """Return by how much clustering inflates the variance of a mean (Kish, 1965); at least 1.

        Args:
            intraclass: correlation of two items of one prompt; for that of two variables, the product of theirs.
        """
        if not self.items:
            return 1.0
        return 1.0 + (self.squares / self.items - 1.0) * max(0.0, intraclass)


@dataclass(frozen=True, slots=True, eq=False)
class WindowStatistics:
    """What a stretch of the stream leaves behind.

    ``lengths``, ``lengths_within``: of (reward, log_tokens), pooled and about the means of the prompts.
    ``styles``, ``styles_within``: of `STYLE_COLUMNS`. ``rewards``, ``surprises``: of one variable each; the rewards
    also of flagged and unflagged items apart; ``oe_surprises`` and ``overlaps`` are as they are. ``tells``: how many of
    the ``num_styled`` items have more of each of `TELLS` than the reference's threshold, in that order.
    ``num_top1_ood`` of ``num_judged_groups`` groups have a flagged best completion.
    """

    clusters: Clusters
    num_truncated: int
    rewards: Moments
    lengths: Moments
    lengths_within: WithinMoments
    styles: Moments
    styles_within: WithinMoments
    surprises: Moments
    oe_surprises: Moments
    overlaps: Moments
    num_flagged: int
    flagged_rewards: Moments
    unflagged_rewards: Moments
    num_styled: tuple[int, ...]
    tells: tuple[int, ...]
    num_judged_groups: int
    num_top1_ood: int
    num_pairs: int
    num_tied_pairs: int

    @property
    def num_items(self) -> int:
        """Items seen."""
        return self.clusters.items

    @property
    def num_judged(self) -> int:
        """Items with a p-value."""
        return self.surprises.count

    def merged(self, other: WindowStatistics) -> WindowStatistics:
        """Return the statistics of both stretches, which have no prompt group in common."""
        parts: dict[str, Any] = {
            part.name: _merged(getattr(self, part.name), getattr(other, part.name)) for part in fields(self)
        }
        return WindowStatistics(**parts)


def merge_windows(parts: Iterable[WindowStatistics]) -> WindowStatistics:
    """Return the statistics of all parts together."""
    return reduce(WindowStatistics.merged, parts, EMPTY)


def summarize(items: ObservedItems, tell_thresholds: NDArray[np.float64] | None) -> WindowStatistics:
    """Return the statistics of some items, whose groups are whole.

    Args:
        items: as they came.
        tell_thresholds: of each of `TELLS`, as the reference has them; without a reference no tell is counted.
    """
    lengths, length_prompts = items.known("reward", "log_tokens")
    styles, style_prompts = items.known(*STYLE_COLUMNS)
    judged, judged_prompts = items.known("reward", "surprise", "flag")
    flagged = judged[:, 2] > 0
    tells, num_styled = _count_tells(items, tell_thresholds)
    num_judged_groups, num_top1_ood = count_best(judged[:, 0], flagged, judged_prompts)
    num_pairs, num_tied_pairs = count_pairs(items.columns("reward")[:, 0], items.prompts)
    return WindowStatistics(
        clusters=Clusters.of(items.prompts),
        num_truncated=int(items.truncated.sum()),
        rewards=Moments.of(items.columns("reward")),
        lengths=Moments.of(lengths),
        lengths_within=WithinMoments.of(lengths, length_prompts),
        styles=Moments.of(styles),
        styles_within=WithinMoments.of(styles, style_prompts),
        surprises=Moments.of(judged[:, 1:2]),
        oe_surprises=Moments.of(items.known("oe_surprise")[0]),
        overlaps=Moments.of(items.known("prompt_overlap")[0]),
        num_flagged=int(flagged.sum()),
        flagged_rewards=Moments.of(judged[flagged, :1]),
        unflagged_rewards=Moments.of(judged[~flagged, :1]),
        num_styled=num_styled,
        tells=tells,
        num_judged_groups=num_judged_groups,
        num_top1_ood=num_top1_ood,
        num_pairs=num_pairs,
        num_tied_pairs=num_tied_pairs,
    )


def count_best(rewards: NDArray[np.float64], flagged: NDArray[np.bool_], prompts: NDArray[np.int64]) -> tuple[int, int]:
    """Count the groups of two or more judged completions, and those of them whose best completion is flagged."""
    order = np.lexsort((-rewards, prompts))
    _, first, sizes = np.unique(prompts[order], return_index=True, return_counts=True)
    best = order[first[sizes > 1]]
    return len(best), int(flagged[best].sum())


def count_pairs(rewards: NDArray[np.float64], prompts: NDArray[np.int64]) -> tuple[int, int]:
    """Count the pairs of completions of one prompt, and those of them that have the same reward."""
    sizes = np.unique(prompts, return_counts=True)[1]
    twins = np.unique(np.column_stack([prompts, rewards]), axis=0, return_counts=True)[1]
    return int((sizes * (sizes - 1)).sum()) // 2, int((twins * (twins - 1)).sum()) // 2


def _merged(one: Any, other: Any) -> Any:
    """Merge two parts of a window: counts and rows of counts add, everything else knows how."""
    if isinstance(one, int):
        return one + other
    if isinstance(one, tuple):
        return tuple(a + b for a, b in zip(one, other, strict=True))
    return one.merged(other)


def _count_tells(
    items: ObservedItems, thresholds: NDArray[np.float64] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if thresholds is None:
        return (0,) * len(TELLS), (0,) * len(TELLS)
    values = items.columns(*TELLS)
    above, known = (values > thresholds).sum(axis=0), (~np.isnan(values)).sum(axis=0)
    return tuple(int(count) for count in above), tuple(int(count) for count in known)


EMPTY = summarize(ObservedItems.of(()), None)
"""The statistics of nothing; merging them changes nothing."""
