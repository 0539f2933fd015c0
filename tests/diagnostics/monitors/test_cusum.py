"""Cumulative sums: simulated run lengths are those that the thresholds are designed for."""

from __future__ import annotations

import numpy as np
import pytest

from service.diagnostics.monitors.cusum import Cusum, average_run_length, family_threshold, threshold_for


@pytest.mark.parametrize(("threshold", "batches"), [(4, 338), (5, 938), (6, 2573), (8, 19_112), (10, 141_347)])
def test_run_lengths_are_siegmunds(threshold: float, batches: float) -> None:
    """The run lengths without a shift are the published ones."""
    assert average_run_length(threshold) == pytest.approx(batches, rel=1e-3)


@pytest.mark.parametrize("run_length", [100, 1e4, 180_000])
def test_threshold_inverts_the_run_length(run_length: float) -> None:
    """The threshold for a run length has that run length."""
    assert average_run_length(threshold_for(run_length)) == pytest.approx(run_length, rel=1e-6)


def test_family_shares_the_false_alarms() -> None:
    """Nine two-sided signals, one false alarm in 10,000 batches: eighteen sums with one in 180,000 each."""
    assert family_threshold(9, 10_000) == pytest.approx(threshold_for(180_000))


def test_impossible_run_length_is_refused() -> None:
    """A run length below that of a threshold of zero is an error."""
    with pytest.raises(ValueError, match="No threshold"):
        threshold_for(0.5)


def run_length(rng: np.random.Generator, shift: float, threshold: float) -> int:
    total, steps = Cusum(), 0
    while not total.alarming_up:
        total = total.stepped(rng.normal() + shift, threshold)
        steps += 1
    return steps


@pytest.mark.parametrize(("shift", "threshold"), [(0.0, 3.0), (1.0, 5.0), (2.0, 10.0)])
def test_run_lengths_in_simulation(shift: float, threshold: float) -> None:
    """Simulated mean run lengths agree with the formula, with and without a shift."""
    rng = np.random.default_rng(0)

    runs = [run_length(rng, shift, threshold) for _ in range(400)]

    mean, error = float(np.mean(runs)), float(np.std(runs)) / 20
    assert mean == pytest.approx(average_run_length(threshold, shift), abs=3 * error + 0.05 * mean)


def test_alarm_holds_until_the_shift_is_over() -> None:
    """An alarm begins above the threshold and ends when the sum is zero, soon after the end of a long shift."""
    total = Cusum()
    for _ in range(1000):
        total = total.stepped(3.0, 5.0)
    assert (total.alarming_up, total.alarming_down, total.up) == (True, False, 10.0)

    states = []
    for _ in range(25):
        total = total.stepped(0.0, 5.0)
        states.append(total.alarming)

    assert states == [True] * 19 + [False] * 6


def test_both_directions_raise_alarms() -> None:
    """A downward shift raises an alarm of its own direction."""
    total = Cusum()
    for _ in range(4):
        total = total.stepped(-2.5, 5.0)

    assert (total.alarming_up, total.alarming_down) == (False, True)
