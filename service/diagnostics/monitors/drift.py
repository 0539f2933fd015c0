"""Whether a run's completions drift away from those at its start, or from the calibration's: a test by betting.

Before each batch, bets are placed on the direction in which its mean deviates: on every single statistic, and on a
linear classifier (a whitened difference of means) that was trained on the batches before. A bet's factor has an
expectation of at most 1 while nothing changes, so a product of them that restarts at 1 (an e-detector of the CUSUM
kind; Shin, Ramdas and Rinaldo, 2022, arXiv 2203.03532), averaged over the bets, exceeds a threshold at most once in as
many batches. Cf. classifier two-sample tests (Lopez-Paz and Oquab, 2017).

Pure but for the object that a monitor owns: no clock, no thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.monitors.drift_reference import DriftReference

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

START_BATCHES = 8
"""Batches that count as the start of a run."""

RECENT_BATCHES = 8
"""Batches that count as recent."""

MIN_BATCHES = 4
MIN_ITEMS = 512
"""Before a bet is placed, so many must have shown how the statistics vary."""

BETS = np.array([0.25, 0.5, 1.0, 2.0])
"""Shifts that bets expect, in standard errors of a batch."""

MEMORIES = np.array([0.5, 0.9])
"""Weight of the previous batches in the direction of the classifier."""

RIDGE = 0.2
"""Share of the identity in the correlation matrix by which the classifier is whitened."""

MAX_Z = 4.0
"""Limit of a batch's deviation in standard errors: one unusual request alone is not drift."""

RETURNED_Z = 3.0
"""An alarm ends when no statistic of the recent batches differs by more standard errors."""


@dataclass(frozen=True, slots=True, eq=False)
class BatchMoments:
    """The moments of one batch. Values that are unknown (NaN) count for no column."""

    counts: Vector
    """Known values of each column, [columns]."""

    means: Vector
    """[columns]; 0 where nothing is known."""

    scatter: Matrix
    """Sum over prompts of the products of their summed deviations, [columns, columns]: the covariance of the mean times
    the squared number of items, however the items are clustered by prompt."""

    third: Vector
    """Sum over prompts of the cubes of their summed deviations, [columns]."""

    @classmethod
    def of(cls, values: Matrix, prompts: NDArray[np.int64]) -> BatchMoments:
        """Return the moments of items [n, columns] with their prompt numbers [n]."""
        known = ~np.isnan(values)
        counts = known.sum(axis=0).astype(np.float64)
        means = np.where(known, values, 0.0).sum(axis=0) / np.maximum(counts, 1.0)
        deviations = np.where(known, values - means, 0.0)
        order = np.argsort(prompts, kind="stable")
        starts = np.flatnonzero(np.diff(prompts[order], prepend=prompts[order][:1] - 1)) if len(prompts) else order
        sums = np.add.reduceat(deviations[order], starts, axis=0) if len(prompts) else deviations
        return cls(counts, means, sums.T @ sums, (sums**3).sum(axis=0))


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """The mean of some batches, which merges exactly."""

    counts: Vector
    sums: Vector

    @classmethod
    def none(cls, num_columns: int) -> Means:
        """Return the mean of no item."""
        return cls(np.zeros(num_columns), np.zeros(num_columns))

    @classmethod
    def of(cls, batch: BatchMoments) -> Means:
        """Return the mean of a batch."""
        return cls(batch.counts, batch.counts * batch.means)

    def merged(self, other: Means) -> Means:
        """Return the mean of both."""
        return Means(self.counts + other.counts, self.sums + other.sums)

    @property
    def values(self) -> Vector:
        """The mean of each column; 0 where nothing is known."""
        return np.asarray(self.sums / np.maximum(self.counts, 1.0))


@dataclass(slots=True, eq=False)
class Spread:
    """How the mean of a batch varies, learned from the batches so far."""

    counts: Vector
    scatter: Matrix
    third: Vector

    differences: Vector
    """Sums of squared standardised differences of successive batches: more than 1 each, if batches vary more than their
    prompts explain. A slow drift does not change them (von Neumann, 1941)."""

    num_differences: Vector

    @classmethod
    def none(cls, num_columns: int) -> Spread:
        """Return that of no batch."""
        zeros = np.zeros(num_columns)
        return cls(zeros, np.zeros((num_columns, num_columns)), zeros, zeros.copy(), zeros.copy())

    def variances(self, scarce: Vector) -> Vector:
        """Return the variance of a mean times its number of items, [columns]; 0 for a column that never varied."""
        return np.asarray((np.diag(self.scatter) + scarce**2) / np.maximum(self.counts, 1.0))

    def skewness(self, scarce: Vector) -> Vector:
        """Return the skewness of a mean times the square root of its number of items, [columns]."""
        variances = self.variances(scarce)
        cubes = (self.third + scarce**3) / np.maximum(self.counts, 1.0)
        return np.divide(cubes, variances**1.5, out=np.zeros_like(cubes), where=variances > 0)

    def excess(self) -> Vector:
        """Return the factor by which batches vary more than their prompts explain, at least 1, [columns]."""
        return np.maximum(1.0, (self.differences + 8.0) / (self.num_differences + 8.0))

    def correlations(self) -> Matrix:
        """Return the correlation matrix of the columns, shrunk towards the identity."""
        deviations = np.sqrt(np.diag(self.scatter))
        scale = np.divide(1.0, deviations, out=np.zeros_like(deviations), where=deviations > 0)
        found = (1.0 - RIDGE) * self.scatter * np.outer(scale, scale)
        np.fill_diagonal(found, 1.0)
        return np.asarray(found)

    def add(self, batch: BatchMoments, previous: BatchMoments | None, scarce: Vector) -> None:
        """Learn from a batch and the one before it."""
        if previous is not None:
            variances = self.variances(scarce)
            both = (batch.counts > 0) & (previous.counts > 0) & (variances > 0)
            inverse = 1.0 / np.maximum(batch.counts, 1.0) + 1.0 / np.maximum(previous.counts, 1.0)
            squares = (batch.means - previous.means) ** 2 / np.where(both, variances * inverse, 1.0)
            self.differences += np.where(both, np.minimum(squares, 2 * MAX_Z**2), 0.0)
            self.num_differences += both
        self.counts = self.counts + batch.counts
        self.scatter = self.scatter + batch.scatter
        self.third = self.third + batch.third


class Bets:
    """The logarithms of the products of all bets of one comparison.

    Args:
        num_columns: statistics that are compared.
        num_directions: directions of the classifier; 0: single statistics only.
    """

    def __init__(self, num_columns: int, num_directions: int) -> None:
        self._single = np.zeros((2, len(BETS), num_columns))
        self._joint = np.zeros((num_directions, len(BETS)))

    def place(self, single: Matrix, skewness: Vector, joint: Vector) -> None:
        """Multiply by the factors of a batch.

        Args:
            single: deviation upwards and downwards of each statistic, in standard errors, [2, columns].
            skewness: of the deviations upwards, [columns].
            joint: deviation along each direction of the classifier, [directions].
        """
        signed = np.stack([skewness, -skewness])[:, None, :]
        bets = BETS[None, :, None]
        z = np.minimum(single, MAX_Z)[:, None, :]
        self._single = np.maximum(self._single, 0.0) + bets * z - bets**2 / 2 - bets**3 * np.maximum(signed, 0.0) / 6
        if len(self._joint):
            along = np.minimum(joint, MAX_Z)[:, None]
            self._joint = np.maximum(self._joint, 0.0) + BETS * along - BETS**2 / 2

    def log_evidence(self) -> float:
        """Return ln of the mean of the products; half of the weight is the classifier's, where there is one."""
        parts = [part.ravel() for part in (self._single, self._joint) if part.size]
        weights = np.concatenate([np.full(part.size, 1.0 / (part.size * len(parts))) for part in parts])
        logs = np.concatenate(parts)
        largest = float(logs.max())
        return largest + math.log(float(weights @ np.exp(logs - largest)))


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """One comparison by value: of one replica, or of several merged."""

    log_evidence: float
    """ln of the mean of the products of bets; merged, the largest."""

    alarm: bool
    num_alarms: int
    """Alarms that have begun."""

    def merged(self, other: Comparison) -> Comparison:
        """Return both merged."""
        return Comparison(
            max(self.log_evidence, other.log_evidence), self.alarm or other.alarm, self.num_alarms + other.num_alarms
        )


@dataclass(frozen=True, slots=True, eq=False)
class DriftState:
    """The state of a drift detector by value: of one replica, or of several merged."""

    start: Means
    """Of the first batches of the run."""

    recent: Means
    """Of the latest batches."""

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
        self._spread = Spread.none(num)
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
        if self._num_batches >= MIN_BATCHES and self._spread.counts.max(initial=0.0) >= MIN_ITEMS:
            self._compare(batch)
        self._num_batches += 1
        if self._num_batches <= START_BATCHES:
            self._start = self._start.merged(Means.of(batch))
        if not self._sides["start"].alarm:  # what is compared with stays as it was before the alarm
            self._before = self._before.merged(Means.of(batch))
        self._spread.add(batch, self._previous, self._scarce)
        self._previous = batch

    def state(self) -> DriftState:
        """Return the state by value."""
        counts = self._spread.counts
        return DriftState(
            self._start,
            _merged(self._recent, len(self._scarce)),
            Means(counts, counts * self._spread.variances(self._scarce) * self._spread.excess()),
            {name: Comparison(side.log_evidence, side.alarm, side.num_alarms) for name, side in self._sides.items()},
            self._threshold,
            self._num_batches,
        )

    def _compare(self, batch: BatchMoments) -> None:
        variances = self._spread.variances(self._scarce) * self._spread.excess()
        skewness = self._spread.skewness(self._scarce) / np.sqrt(np.maximum(batch.counts, 1.0))
        recent = _merged(self._recent, len(self._scarce))
        self._compare_with_start(Means.of(batch), recent, variances, skewness)
        if self._reference is not None:
            self._compare_with_calibration(self._reference, Means.of(batch), recent, variances, skewness)

    def _compare_with_start(self, batch: Means, recent: Means, variances: Vector, skewness: Vector) -> None:
        z = standardised(batch, self._before.values, self._before.counts, variances)
        side = self._sides["start"]
        side.bets.place(np.stack([z, -z]), skewness, self._along(z))
        self._trained = MEMORIES[:, None] * self._trained + z
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

    def _along(self, z: Vector) -> Vector:
        """Return the deviations along the directions that were trained on the batches before."""
        correlations = self._spread.correlations()
        directions = np.linalg.solve(correlations, self._trained.T).T
        lengths = np.sqrt(np.einsum("ij,jk,ik->i", directions, correlations, directions))
        return np.asarray(np.divide(directions @ z, lengths, out=np.zeros(len(lengths)), where=lengths > 0))


def standardised(found: Means, means: Vector, counts: Vector, variances: Vector) -> Vector:
    """Return the difference of two means in standard errors, [columns]; 0 where one is unknown or nothing varies.

    Args:
        found: of some batches.
        means: what they are compared with, [columns].
        counts: items behind these means, [columns]; infinite where they are exact, 0 where they are unknown.
        variances: variance of a mean times its number of items, [columns].
    """
    known = (found.counts > 0) & (counts > 0) & (variances > 0)
    inverse = 1.0 / np.maximum(found.counts, 1.0) + 1.0 / np.maximum(counts, 1.0)
    differences = np.where(known, found.values - means, 0.0)
    return np.asarray(differences / np.sqrt(np.where(known, variances * inverse, 1.0)))


def _has_returned(z: Vector) -> bool:
    return bool(np.abs(z).max(initial=0.0) < RETURNED_Z)


def _merged(parts: Iterable[Means], num_columns: int) -> Means:
    total = Means.none(num_columns)
    for part in parts:
        total = total.merged(part)
    return total
