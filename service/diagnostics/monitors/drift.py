"""Whether a stream's completions drift away from those at its start, or from the calibration's: a test by betting.

Before each batch, bets are placed on the direction in which its mean deviates: on every single statistic, and on a
linear classifier (a whitened difference of means) that was trained on the batches before; cf. classifier two-sample
tests (Lopez-Paz and Oquab, 2017). The mean at the start is not known but estimated from all batches before, and a
batch's deviation from it has the variance of both (recursive residuals, Brown, Durbin and Evans, 1975): deviations of
successive batches are then independent, and the error of the estimate does not accumulate.

Pure but for the object that a monitor owns: no clock, no thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from service.diagnostics.monitors.bets import Bets
from service.diagnostics.monitors.drift_moments import MAX_Z, BatchMoments, Matrix, Means, Spread, Vector, standardised
from service.diagnostics.monitors.drift_reference import DriftReference

START_BATCHES = 8
"""Batches that count as the start of a stream; phrases are known only when there are prompts to compare with."""

RECENT_BATCHES = 8
"""Batches that count as recent."""

MIN_BATCHES = 4
MIN_ITEMS = 512
"""Before a bet is placed, so many must have shown how the statistics vary."""

MIN_KNOWN = 32
"""Values that a batch must have of a statistic, so that it is bet on: the mean of fewer is far from normal."""

MEMORIES = np.array([0.5, 0.9])
"""Weight of the previous batches in the direction of the classifier."""

RETURNED_Z = 3.0
"""An alarm ends when no statistic of the recent batches differs by more standard errors."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One comparison by value: of one replica, or of several merged."""

    log_evidence: float
    """ln of the mean of the products of bets; merged, the largest."""

    gains: Matrix
    """ln of what the best bet on each statistic has gained, upwards and downwards, [2, columns]; merged, the larger."""

    alarm: bool
    num_alarms: int
    """Alarms that have begun."""

    def merged(self, other: Comparison) -> Comparison:
        """Return both merged."""
        return Comparison(
            max(self.log_evidence, other.log_evidence),
            np.maximum(self.gains, other.gains),
            self.alarm or other.alarm,
            self.num_alarms + other.num_alarms,
        )


@dataclass(frozen=True, slots=True, eq=False)
class DriftState:
    """The state of a drift detector by value: of one replica, or of several merged."""

    start: Means
    """Of the first batches of the run: eight, but at least four and none that is recent while there are few."""

    recent: Means
    """Of the latest batches: eight, but none of the first four once there are more."""

    variances: Means
    """Of the variance of a mean times its number of items, weighted by items."""

    comparisons: dict[str, Comparison]
    """By what is compared with: ``start``, ``calibration``."""

    threshold: float
    """The evidence above which a comparison is in alarm."""

    num_batches: int

    def merged(self, other: DriftState) -> DriftState:
        """Return both merged: means exactly, of each comparison the larger evidence."""
        return DriftState(
            self.start.merged(other.start),
            self.recent.merged(other.recent),
            self.variances.merged(other.variances),
            {name: found.merged(other.comparisons[name]) for name, found in self.comparisons.items()},
            self.threshold,
            self.num_batches + other.num_batches,
        )


@dataclass(slots=True)
class _Side:
    """One comparison as it goes on."""

    bets: Bets
    alarm: bool = False
    num_alarms: int = 0
    log_evidence: float = 0.0

    def update(self, threshold: float, *, returned: bool, fresh: Bets) -> None:
        """Raise the alarm, or end it and bet anew."""
        self.log_evidence = min(self.bets.log_evidence(), 2 * threshold)
        if self.alarm and returned:
            self.alarm, self.bets, self.log_evidence = False, fresh, 0.0
        elif not self.alarm and self.log_evidence >= threshold:
            self.alarm = True
            self.num_alarms += 1


class DriftDetector:
    """Compares the batches of a stream with those before, and with the calibration.

    Args:
        scarce: for each statistic the value that one item in a sample is assumed to have, [columns].
        reference: of the calibration; None: only the start of the run is compared with.
        false_alarm_batches: batches between false alarms of all comparisons together.
    """

    def __init__(self, scarce: Vector, reference: DriftReference | None, false_alarm_batches: float) -> None:
        num = len(scarce)
        self._scarce = scarce
        self._reference = reference
        self._threshold = math.log(false_alarm_batches * (1 if reference is None else 2))
        self._before, self._start = Means.none(num), Means.none(num)
        self._early: list[Means] = []
        self._spread = Spread.none(num)
        self._num_start = np.zeros(num)
        self._recent: deque[Means] = deque(maxlen=RECENT_BATCHES)
        self._trained = np.zeros((len(MEMORIES), num))
        self._previous: BatchMoments | None = None
        self._sides = {"start": _Side(self._fresh("start"))}
        if reference is not None:
            self._sides["calibration"] = _Side(self._fresh("calibration"))
        self._num_batches = 0

    def _fresh(self, side: str) -> Bets:
        return Bets(len(self._scarce), len(MEMORIES) if side == "start" else 0)

    def step(self, batch: BatchMoments) -> None:
        """Bet on one batch, then learn from it."""
        self._recent.append(Means.of(batch))
        if self._num_batches < START_BATCHES:
            self._early.append(Means.of(batch))
        if self._is_ready:
            self._compare(batch)
        self._start = self._start.merged(self._part_of_start(batch))
        if not self._sides["start"].alarm:  # what is compared with stays as it was before the alarm
            self._before = self._before.merged(self._limited(Means.of(batch)))
        self._spread.add(batch, self._previous, self._scarce)
        self._previous = batch
        self._num_batches += 1

    @property
    def _is_ready(self) -> bool:
        return self._num_batches >= MIN_BATCHES and self._spread.counts.max(initial=0.0) >= MIN_ITEMS

    def state(self) -> DriftState:
        """Return the state by value."""
        counts = self._spread.counts
        start, recent = self._ends()
        return DriftState(
            start,
            recent,
            Means(counts, counts * self._spread.variances(self._scarce) * self._spread.excess()),
            {
                name: Comparison(side.log_evidence, side.bets.gains(), side.alarm, side.num_alarms)
                for name, side in self._sides.items()
            },
            self._threshold,
            self._num_batches,
        )

    def _ends(self) -> tuple[Means, Means]:
        """Return the means of the start and of the recent batches, which have no batch in common after four batches."""
        recent, num = list(self._recent), len(self._scarce)
        if self._num_batches <= MIN_BATCHES or self._num_batches >= START_BATCHES + RECENT_BATCHES:
            return self._start, _merged(recent, num)
        num_start = max(MIN_BATCHES, self._num_batches - RECENT_BATCHES)
        return _merged(self._early[:num_start], num), _merged(recent[num_start - self._num_batches :], num)

    def _compare(self, batch: BatchMoments) -> None:
        variances = self._spread.variances(self._scarce) * self._spread.excess()
        skewness = self._spread.skewness(self._scarce) / np.sqrt(np.maximum(batch.counts, 1.0))
        counts = np.where(batch.counts >= MIN_KNOWN, batch.counts, 0.0)
        found, recent = Means(counts, counts * batch.means), _merged(self._recent, len(self._scarce))
        self._compare_with_start(found, recent, variances, skewness)
        if self._reference is not None:
            self._compare_with_calibration(self._reference, found, recent, variances, skewness)

    def _compare_with_start(self, batch: Means, recent: Means, variances: Vector, skewness: Vector) -> None:
        z = standardised(batch, self._before.values, self._before.counts, variances)
        side = self._sides["start"]
        side.bets.place(np.stack([z, -z]), skewness, self._along(z))
        self._trained = MEMORIES[:, None] * self._trained + np.clip(z, -MAX_Z, MAX_Z)
        lasting = standardised(recent, self._before.values, self._before.counts, variances)
        side.update(self._threshold, returned=_has_returned(lasting), fresh=self._fresh("start"))

    def _compare_with_calibration(
        self, reference: DriftReference, batch: Means, recent: Means, variances: Vector, skewness: Vector
    ) -> None:
        up, down, lasting = (
            standardised(found, reference.means + shift, reference.certainty, variances)
            for found, shift in ((batch, reference.allowed), (batch, -reference.allowed), (recent, 0.0))
        )
        side = self._sides["calibration"]
        side.bets.place(np.stack([up, -down]), skewness, np.empty(0))
        allowed = standardised(recent, reference.means - reference.allowed, reference.certainty, variances) - lasting
        returned = _has_returned(np.maximum(np.abs(lasting) - allowed, 0.0))
        side.update(self._threshold, returned=returned, fresh=self._fresh("calibration"))

    def _part_of_start(self, batch: BatchMoments) -> Means:
        """Return those columns of a batch that count as the start: of each the first batches in which it is known."""
        counts = np.where(self._num_start < START_BATCHES, batch.counts, 0.0)
        self._num_start += counts > 0
        return Means(counts, counts * batch.means)

    def _limited(self, batch: Means) -> Means:
        """Return the mean of a batch, no farther from those before than a bet would count."""
        if not self._is_ready:
            return batch
        variances = self._spread.variances(self._scarce) * self._spread.excess()
        z = standardised(batch, self._before.values, self._before.counts, variances)
        excess = np.divide(z - np.clip(z, -MAX_Z, MAX_Z), z, out=np.zeros_like(z), where=z != 0)
        values = batch.values - excess * (batch.values - self._before.values)
        return Means(batch.counts, batch.counts * values)

    def _along(self, z: Vector) -> Vector:
        """Return the deviations along the directions that were trained on the batches before."""
        correlations = self._spread.correlations()
        directions = np.linalg.solve(correlations, self._trained.T).T
        lengths = np.sqrt(np.einsum("ij,jk,ik->i", directions, correlations, directions))
        return np.asarray(np.divide(directions @ z, lengths, out=np.zeros(len(lengths)), where=lengths > 0))


def _has_returned(z: Vector) -> bool:
    return bool(np.abs(z).max(initial=0.0) < RETURNED_Z)


def _merged(parts: Iterable[Means], num_columns: int) -> Means:
    total = Means.none(num_columns)
    for part in parts:
        total = total.merged(part)
    return total
