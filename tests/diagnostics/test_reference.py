"""Percentiles, and the part of a reward that length explains."""

from __future__ import annotations

import numpy as np
import pytest

from service.diagnostics.reference import LengthCurve, Reference


def test_z_and_percentile() -> None:
    """The z is in standard deviations, the percentile the share at or below."""
    reference = Reference.of(np.arange(101.0))

    assert reference.z(50.0) == 0.0
    assert reference.percentile(-1.0) == 0.0
    assert reference.percentile(25.0) == pytest.approx(0.25, abs=0.01)
    assert reference.percentile(1e9) == 1.0


def test_length_bias_is_removed() -> None:
    """An adjusted reward is not correlated with length, also where the bias saturates, and its mean is unchanged."""
    rng = np.random.default_rng(0)
    log_lengths = rng.uniform(1, 7, 6000)
    rewards = np.minimum(log_lengths, 5.0) + rng.normal(0, 0.5, 6000)
    curve = LengthCurve.of(log_lengths[:3000], rewards[:3000])

    fresh = [
        curve.adjusted(reward, round(np.expm1(length)))
        for reward, length in zip(rewards[3000:], log_lengths[3000:], strict=True)
    ]

    assert abs(np.corrcoef(fresh, log_lengths[3000:])[0, 1]) < 0.05
    assert np.mean(fresh) == pytest.approx(rewards.mean(), abs=0.05)


def test_rewards_may_fall_with_length() -> None:
    """The curve is not constrained to rise."""
    rng = np.random.default_rng(0)
    log_lengths = rng.uniform(1, 7, 2000)

    curve = LengthCurve.of(log_lengths, -log_lengths)

    assert np.all(np.diff(curve.y) < 0)


def test_few_distinct_lengths_are_fewer_knots() -> None:
    """Bins with equal edges are merged; the knots are ascending."""
    rng = np.random.default_rng(0)
    curve = LengthCurve.of(np.repeat([1.0, 2.0], 500), rng.normal(size=1000))

    assert len(curve.x) <= 3
    assert np.all(np.diff(curve.x) > 0)
