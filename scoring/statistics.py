"""What a job reports about its rewards: sums of blocks that can be added, and the summary that follows from them.

A block's sums are stored with it, so that the summary of a resumed job is that of all its blocks and needs no memory
for the rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scoring.blocks import InputRow, prompt_of
from scoring.columns import PAIR_PREFIXES
from service.diagnostics.monitors.moments import Z95, Moments, WithinMoments, correlation_interval, pearson
from service.records import completion_text

OOD_LEVELS = (0.01, 0.05)
"""P-values of which the rates are reported."""

_SIZE = 2  # log length and reward


@dataclass(frozen=True, slots=True)
class PairSums:
    """Sums over pairs with two rewards; a tie counts as half a win. A prompt's pairs in one block are a cluster."""

    pairs: float = 0
    wins: float = 0
    ties: float = 0
    clusters: float = 0

    pairs_squared: float = 0
    """Sum over clusters of the square of their pairs, and so on: what the variance between prompts needs."""

    wins_squared: float = 0
    pairs_by_wins: float = 0

    def merged(self, other: PairSums) -> PairSums:
        """Return the sums of both."""
        return PairSums(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    def accuracy(self) -> tuple[float, float, float] | None:
        """Return the share of pairs whose chosen completion has the higher reward, with its 95 percent interval.

        Wilson's score interval (Wilson 1927) with the effective number of pairs: pairs of one prompt are not
        independent, so the variance is that between prompts (Rao and Scott 1992). None without pairs.
        """
        if not self.pairs:
            return None
        p, n = self.wins / self.pairs, self._effective_pairs()
        scale = 1 + Z95**2 / n
        center = (p + Z95**2 / (2 * n)) / scale
        half_width = Z95 / scale * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return p, max(0.0, center - half_width), min(1.0, center + half_width)

    def _effective_pairs(self) -> float:
        p = self.wins / self.pairs
        between = self.wins_squared - 2 * p * self.pairs_by_wins + p * p * self.pairs_squared
        if self.clusters == self.pairs or self.clusters < 2 or between <= 0 or not 0 < p < 1:
            return self.pairs if self.clusters == self.pairs else self.clusters
        variance = between / self.pairs**2 * self.clusters / (self.clusters - 1)
        return min(self.pairs, p * (1 - p) / variance)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over rows and items."""

    num_rows: int = 0

    errors: Counter[str] = field(default_factory=Counter)
    """Rows with an error, by its code."""

    num_items: int = 0
    """Completions, with a reward or without."""

    pairs: PairSums = PairSums()

    length: Moments = field(default_factory=lambda: Moments.empty(_SIZE))
    """Of log length and reward of all items with a reward."""

    length_within: WithinMoments = field(default_factory=lambda: WithinMoments.empty(_SIZE))
    """The same about the means of the prompts in each block."""

    num_p_values: int = 0

    num_below: tuple[int, ...] = (0,) * len(OOD_LEVELS)
    """Items whose out-of-distribution p-value is below each of `OOD_LEVELS`."""

    @property
    def num_errors(self) -> int:
        """Rows with an error."""
        return self.errors.total()

    def merged(self, other: Statistics) -> Statistics:
        """Return the sums of both."""
        return Statistics(
            self.num_rows + other.num_rows,
            self.errors + other.errors,
            self.num_items + other.num_items,
            self.pairs.merged(other.pairs),
            self.length.merged(other.length),
            self.length_within.merged(other.length_within),
            self.num_p_values + other.num_p_values,
            tuple(map(sum, zip(self.num_below, other.num_below, strict=True))),
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain values; `from_json` reads them."""
        return {
            "rows": self.num_rows,
            "errors": dict(self.errors),
            "items": self.num_items,
            "pairs": [getattr(self.pairs, name) for name in PairSums.__slots__],
            "length": [self.length.count, self.length.mean.tolist(), self.length.comoment.tolist()],
            "length_within": [
                self.length_within.count,
                self.length_within.num_groups,
                self.length_within.comoment.tolist(),
            ],
            "p_values": self.num_p_values,
            "below": list(self.num_below),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Statistics:
        """Return the sums that `as_json` wrote."""
        count, mean, comoment = values["length"]
        within_count, num_groups, within = values["length_within"]
        return cls(
            values["rows"],
            Counter(values["errors"]),
            values["items"],
            PairSums(*values["pairs"]),
            Moments(count, np.array(mean), np.array(comoment)),
            WithinMoments(within_count, num_groups, np.array(within)),
            values["p_values"],
            tuple(values["below"]),
        )


@dataclass(frozen=True, slots=True)
class _ScoredItem:
    prompt: Hashable
    reward: float
    length: float
    p_value: float | None


def statistics_of(rows: Sequence[InputRow], columns: Sequence[Mapping[str, Any]]) -> Statistics:
    """Return the sums of a block.

    Args:
        rows: as they were read.
        columns: what was added to each, see `scoring.columns.scored_columns`.
    """
    items = [item for row, added in zip(rows, columns, strict=True) for item in _scored_items(row, added)]
    p_values = [item.p_value for item in items if item.p_value is not None]
    prompts: dict[Hashable, int] = {}
    groups = np.array([prompts.setdefault(item.prompt, len(prompts)) for item in items], dtype=np.int64)
    points = np.array([(math.log1p(item.length), item.reward) for item in items], dtype=np.float64).reshape(-1, _SIZE)
    return Statistics(
        num_rows=len(rows),
        errors=Counter(str(added["error_code"]) for added in columns if added.get("error_code")),
        num_items=sum(len(row.parsed.completions) for row in rows if row.parsed is not None),
        pairs=_pair_sums(rows, columns),
        length=Moments.of(points),
        length_within=WithinMoments.of(points, groups),
        num_p_values=len(p_values),
        num_below=tuple(sum(p_value < level for p_value in p_values) for level in OOD_LEVELS),
    )


def _scored_items(row: InputRow, added: Mapping[str, Any]) -> Iterator[_ScoredItem]:
    if row.parsed is None:
        return
    prefixes = PAIR_PREFIXES if len(row.parsed.completions) > 1 else ("",)
    for prefix, completion in zip(prefixes, row.parsed.completions, strict=True):
        reward = added.get(prefix + "reward")
        if reward is not None:
            length = added.get(prefix + "length_completion_tokens", len(completion_text(completion)))
            yield _ScoredItem(prompt_of(row), reward, length, added.get(prefix + "ood_p_value"))


def _pair_sums(rows: Sequence[InputRow], columns: Sequence[Mapping[str, Any]]) -> PairSums:
    wins: dict[Hashable, list[float]] = {}
    for row, added in zip(rows, columns, strict=True):
        margin = added.get("margin")
        if margin is not None:
            wins.setdefault(prompt_of(row), []).append(0.5 if margin == 0 else float(margin > 0))
    clusters = [(len(found), sum(found)) for found in wins.values()]
    return PairSums(
        pairs=sum(n for n, _ in clusters),
        wins=sum(w for _, w in clusters),
        ties=sum(win == 0.5 for found in wins.values() for win in found),
        clusters=len(clusters),
        pairs_squared=sum(n * n for n, _ in clusters),
        wins_squared=sum(w * w for _, w in clusters),
        pairs_by_wins=sum(n * w for n, w in clusters),
    )


def summary_lines(total: Statistics, *, length_unit: str) -> list[str]:
    """Return the summary of a job, one fact a line.

    Args:
        total: of all blocks.
        length_unit: ``tokens`` or ``characters``, whichever the lengths are.
    """
    lines = [f"rows: {total.num_rows:,}; with errors: {total.num_errors:,}"]
    lines += [f"  {code}: {count:,}" for code, count in total.errors.most_common()]
    length = total.length
    if length.count:
        spread = length.variance(1)
        deviation = "" if spread is None else f", standard deviation {math.sqrt(spread):.4g}"
        lines.append(f"rewards: {length.count:,}; mean {float(length.mean[1]):.4g}{deviation}")
    if (accuracy := total.pairs.accuracy()) is not None:
        value, low, high = accuracy
        lines.append(
            f"accuracy: {value:.1%} ({low:.1%} to {high:.1%}) of {int(total.pairs.pairs):,} pairs, "
            f"{int(total.pairs.ties):,} ties"
        )
    lines += _correlation_lines(total, length_unit)
    if total.num_p_values:
        rates = [
            f"{below / total.num_p_values:.2%} with p < {level}"
            for below, level in zip(total.num_below, OOD_LEVELS, strict=True)
        ]
        lines.append(f"out of distribution: {', '.join(rates)}, of {total.num_p_values:,} items")
    elif length.count:
        lines.append("out of distribution: not known (needs --diagnostics full and a calibrated model)")
    return lines


def _correlation_lines(total: Statistics, unit: str) -> Iterator[str]:
    length, within = total.length, total.length_within
    pooled = pearson(length.comoment)
    what = f"correlation of reward and log length in {unit}"
    if pooled is not None and (interval := correlation_interval(pooled, length.count - 3)) is not None:
        yield f"{what}: {pooled:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"
    r = pearson(within.comoment)
    size = within.count - within.num_groups - 2
    if r is not None and (interval := correlation_interval(r, size)) is not None:
        yield f"{what}, within prompts: {r:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"
