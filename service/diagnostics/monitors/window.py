"""The sufficient statistics of a segment of the stream, which merge exactly over batches and over replicas.

Pure: items in, statistics out. ``report`` and ``alarms`` compute the monitors from them.
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
"""Variables of the style regression: the reward, then the features that it should not depend on."""

STYLE_SIGNALS: tuple[Column, ...] = ("markdown", "emoji", "hedges", "flattery", "repeat4")
"""Style signals that are monitored by the share of items above the 95 percent quantile of the reference."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """How items are clustered by prompt."""

    items: int = 0
    prompts: int = 0

    squares: int = 0
    """Sum over prompts of the squared number of items."""

    @classmethod
    def of(cls, prompts: NDArray[np.int64]) -> Clusters:
        """Count the items [n] of each prompt."""
        sizes = np.unique(prompts, return_counts=True)[1]
        return cls(len(prompts), len(sizes), int((sizes * sizes).sum()))

    def merged(self, other: Clusters) -> Clusters:
        """Return the counts of both; they must not have a prompt in common."""
        return Clusters(self.items + other.items, self.prompts + other.prompts, self.squares + other.squares)

    def design_effect(self, intraclass: float) -> float:
        """Return the factor by which clustering increases the variance of a mean (Kish, 1965); at least 1.

        Args:
            intraclass: correlation of two items of one prompt; for a correlation of two variables, their product.
        """
        if not self.items:
            return 1.0
        return 1.0 + (self.squares / self.items - 1.0) * max(0.0, intraclass)


@dataclass(frozen=True, slots=True, eq=False)
class OutputStatistics:
    """The statistics of each output of a model with several; empty for a model with one."""

    pooled: tuple[Moments, ...] = ()
    """Moments of (output, log_tokens), over all items."""

    within: tuple[WithinMoments, ...] = ()
    """Co-moments of (output, log_tokens), about the means of the prompts."""

    @classmethod
    def of(cls, items: ObservedItems) -> OutputStatistics:
        """Return the statistics of items; all completions of a prompt must be among them."""
        log_tokens = items.columns("log_tokens")[:, 0]
        pooled, within = [], []
        for output in items.outputs.T:
            rows = np.column_stack([output, log_tokens])
            is_known = ~np.isnan(rows).any(axis=1)
            pooled.append(Moments.of(rows[is_known]))
            within.append(WithinMoments.of(rows[is_known], items.prompts[is_known]))
        return cls(tuple(pooled), tuple(within))

    def merged(self, other: OutputStatistics) -> OutputStatistics:
        """Return the statistics of both segments."""
        if not self.pooled or not other.pooled:
            return self if self.pooled else other
        return OutputStatistics(
            tuple(one.merged(two) for one, two in zip(self.pooled, other.pooled, strict=True)),
            tuple(one.merged(two) for one, two in zip(self.within, other.within, strict=True)),
        )


@dataclass(frozen=True, slots=True, eq=False)
class WindowStatistics:
    """The statistics of a segment of the stream."""

    clusters: Clusters

    num_truncated: int
    """Items of which the model read only a part."""

    rewards: Moments

    lengths: Moments
    """Moments of (reward, log_tokens), over all items."""

    lengths_within: WithinMoments
    """Co-moments of (reward, log_tokens), about the means of the prompts."""

    styles: Moments
    """Moments of `STYLE_COLUMNS`, over all items."""

    styles_within: WithinMoments
    """Co-moments of `STYLE_COLUMNS`, about the means of the prompts."""

    surprises: Moments
    oe_surprises: Moments

    overlaps: Moments
    """Moments of prompt_overlap."""

    num_flagged: int
    flagged_rewards: Moments
    unflagged_rewards: Moments

    num_styled: tuple[int, ...]
    """Items of which the signal is known, for each of `STYLE_SIGNALS`."""

    style_exceedances: tuple[int, ...]
    """Items above the reference's threshold, for each of `STYLE_SIGNALS`."""

    num_groups_with_ood: int
    """Prompts with two or more completions that have a p-value."""

    num_top1_ood: int
    """Those of these prompts whose completion with the highest reward is flagged."""

    num_pairs: int
    """Pairs of completions of one prompt."""

    num_tied_pairs: int
    """Those of these pairs with equal rewards."""

    outputs: OutputStatistics

    @property
    def num_items(self) -> int:
        """Number of items."""
        return self.clusters.items

    @property
    def num_with_ood(self) -> int:
        """Number of items with a p-value."""
        return self.surprises.count

    def merged(self, other: WindowStatistics) -> WindowStatistics:
        """Return the statistics of both segments; they must not have a prompt group in common."""
        parts: dict[str, Any] = {
            part.name: _merged(getattr(self, part.name), getattr(other, part.name)) for part in fields(self)
        }
        return WindowStatistics(**parts)


def merge_windows(parts: Iterable[WindowStatistics]) -> WindowStatistics:
    """Return the statistics of all parts together."""
    return reduce(WindowStatistics.merged, parts, EMPTY)


def summarize(items: ObservedItems, style_thresholds: NDArray[np.float64] | None) -> WindowStatistics:
    """Return the statistics of items; all completions of a prompt must be among them.

    Args:
        items: in order of arrival.
        style_thresholds: the reference's threshold of each of `STYLE_SIGNALS`; None: exceedances are not counted.
    """
    lengths, length_prompts = items.known("reward", "log_tokens")
    styles, style_prompts = items.known(*STYLE_COLUMNS)
    with_ood, ood_prompts = items.known("reward", "surprise", "flag")
    flagged = with_ood[:, 2] > 0
    style_exceedances, num_styled = _count_exceedances(items, style_thresholds)
    num_groups_with_ood, num_top1_ood = count_best(with_ood[:, 0], flagged, ood_prompts)
    rewards, reward_prompts = items.known("reward")
    num_pairs, num_tied_pairs = count_pairs(rewards[:, 0], reward_prompts)
    return WindowStatistics(
        clusters=Clusters.of(items.prompts),
        num_truncated=int(items.truncated.sum()),
        rewards=Moments.of(rewards),
        lengths=Moments.of(lengths),
        lengths_within=WithinMoments.of(lengths, length_prompts),
        styles=Moments.of(styles),
        styles_within=WithinMoments.of(styles, style_prompts),
        surprises=Moments.of(with_ood[:, 1:2]),
        oe_surprises=Moments.of(items.known("oe_surprise")[0]),
        overlaps=Moments.of(items.known("prompt_overlap")[0]),
        num_flagged=int(flagged.sum()),
        flagged_rewards=Moments.of(with_ood[flagged, :1]),
        unflagged_rewards=Moments.of(with_ood[~flagged, :1]),
        num_styled=num_styled,
        style_exceedances=style_exceedances,
        num_groups_with_ood=num_groups_with_ood,
        num_top1_ood=num_top1_ood,
        num_pairs=num_pairs,
        num_tied_pairs=num_tied_pairs,
        outputs=OutputStatistics.of(items),
    )


def count_best(rewards: NDArray[np.float64], flagged: NDArray[np.bool_], prompts: NDArray[np.int64]) -> tuple[int, int]:
    """Count the groups of two or more completions with a p-value, and those whose best completion is flagged."""
    order = np.lexsort((-rewards, prompts))
    _, first, sizes = np.unique(prompts[order], return_index=True, return_counts=True)
    best = order[first[sizes > 1]]
    return len(best), int(flagged[best].sum())


def count_pairs(rewards: NDArray[np.float64], prompts: NDArray[np.int64]) -> tuple[int, int]:
    """Count the pairs of completions of one prompt, and those of them that have the same reward."""
    sizes = np.unique(prompts, return_counts=True)[1]
    equal = np.unique(np.column_stack([prompts, rewards]), axis=0, return_counts=True)[1]
    return int((sizes * (sizes - 1)).sum()) // 2, int((equal * (equal - 1)).sum()) // 2


def _merged(one: Any, other: Any) -> Any:
    """Merge one field of two windows: counts and tuples of counts are added, everything else has `merged`."""
    if isinstance(one, int):
        return one + other
    if isinstance(one, tuple):
        return tuple(a + b for a, b in zip(one, other, strict=True))
    return one.merged(other)


def _count_exceedances(
    items: ObservedItems, thresholds: NDArray[np.float64] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if thresholds is None:
        return (0,) * len(STYLE_SIGNALS), (0,) * len(STYLE_SIGNALS)
    values = items.columns(*STYLE_SIGNALS)
    above, known = (values > thresholds).sum(axis=0), (~np.isnan(values)).sum(axis=0)
    return tuple(int(count) for count in above), tuple(int(count) for count in known)


EMPTY = summarize(ObservedItems.of(()), None)
"""The statistics of no items: the neutral element of `merged`."""
