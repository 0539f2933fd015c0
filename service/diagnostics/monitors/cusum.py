"""Cumulative sums (CUSUM) that detect a lasting shift of a standardised signal at a designed false-alarm rate.

Pure: a sum is a value, a step returns the next one. Page, Continuous Inspection Schemes, 1954. The average run length
is Siegmund's approximation (Sequential Analysis, 1985): the discrete walk exceeds its threshold by 0.583 standard
deviations on average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

OVERSHOOT = 1.166
"""Twice 0.583."""

MAX_THRESHOLD = 100.0
ALLOWANCE = 0.5
"""Subtracted from each step (k), in standard errors of a batch: half of the smallest shift to be detected."""


def average_run_length(threshold: float, shift: float = 0.0, allowance: float = ALLOWANCE) -> float:
    """Return the mean number of batches until a one-sided sum exceeds the threshold.

    Args:
        threshold: h, in standard errors of a batch.
        shift: true mean of the signal, in the same unit; 0 gives the mean time between false alarms.
        allowance: k, subtracted from each step.
    """
    drift = shift - allowance
    height = threshold + OVERSHOOT
    if abs(drift) * height < 1e-6:
        return height * height
    exponent = -2.0 * drift * height
    return (math.exp(min(exponent, 700.0)) - exponent - 1.0) / (2.0 * drift * drift)


def threshold_for(run_length: float) -> float:
    """Return the threshold at which false alarms of a one-sided sum are ``run_length`` batches apart on average.

    Raises:
        ValueError: the run length is not above that of a threshold of 0, or beyond one of `MAX_THRESHOLD`.
    """
    low, high = 0.0, MAX_THRESHOLD
    if not average_run_length(low) < run_length < average_run_length(high):
        raise ValueError(f"No threshold gives a run of {run_length:g} batches.")
    while high - low > 1e-9:
        middle = (low + high) / 2
        if average_run_length(middle) < run_length:
            low = middle
        else:
            high = middle
    return high


def family_threshold(num_signals: int, run_length: float) -> float:
    """Return the threshold of two-sided sums that together raise one false alarm in ``run_length`` batches.

    Each of the ``2 * num_signals`` one-sided sums may raise one in ``2 * num_signals * run_length`` (Bonferroni).
    """
    return threshold_for(2 * num_signals * run_length)


@dataclass(frozen=True, slots=True)
class Cusum:
    """A two-sided cumulative sum of a signal's deviations from its reference, and whether it is in alarm.

    The sums are limited to twice the threshold, so that the end of a long shift is detected soon. An alarm ends when
    the sum of its direction is back at zero.
    """

    up: float = 0.0
    """Sum of upward deviations, in standard errors of a batch."""

    down: float = 0.0
    """Sum of downward deviations, in the same unit."""

    alarming_up: bool = False
    alarming_down: bool = False

    @property
    def alarming(self) -> bool:
        """Whether either direction is in alarm."""
        return self.alarming_up or self.alarming_down

    def stepped(self, z: float, threshold: float, allowance: float = ALLOWANCE) -> Cusum:
        """Return the sum after one more batch.

        Args:
            z: deviation of the batch from the reference, in standard errors.
            threshold: h.
            allowance: k; more than `ALLOWANCE` where the reference itself is uncertain.
        """
        up = min(max(0.0, self.up + z - allowance), 2 * threshold)
        down = min(max(0.0, self.down - z - allowance), 2 * threshold)
        return Cusum(
            up,
            down,
            up > threshold or (self.alarming_up and up > 0),
            down > threshold or (self.alarming_down and down > 0),
        )
