"""Conformal p-values and the common scale of the detectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.diagnostics.conformal import MAX_QUANTILES, TailMap, TailMaps, conformal_p, thinned

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


def test_p_value_by_hand() -> None:
    """Of four reference items two are at least as unusual as 3: (1 + 2) / 5; beyond all of them it is 1 / 5."""
    reference = np.array([1.0, 2.0, 3.0, 4.0])

    assert conformal_p(reference, np.array([3.0, 9.0, 0.0])).tolist() == [0.6, 0.2, 1.0]


def test_nan_has_the_smallest_p_value() -> None:
    """A NaN score ranks above all reference scores."""
    assert conformal_p(np.arange(9.0), np.array([math.nan])).tolist() == [0.1]


def test_false_alarm_rate_is_nominal() -> None:
    """For any distribution, new items from it get p <= alpha with a frequency of about alpha."""
    rng = np.random.default_rng(0)
    reference, fresh = np.sort(rng.standard_cauchy(4000)), rng.standard_cauchy(20_000)

    p_values = conformal_p(reference, fresh)

    for alpha in (0.01, 0.05, 0.3):
        assert (p_values <= alpha).mean() == pytest.approx(alpha, rel=0.35)


@given(st.lists(NUMBERS, min_size=2, max_size=60), st.lists(NUMBERS, min_size=2, max_size=20))
def test_a_map_is_monotonic(reference: list[float], scores: list[float]) -> None:
    """A higher score never has a smaller -ln p, on either side of the threshold, and none is NaN."""
    ordered = np.sort(np.array(scores))
    for fit in (TailMap.of_component, TailMap.of_test):
        surprises = fit(np.array(reference))(ordered)
        assert np.all(np.diff(surprises) >= -1e-9)


def test_the_tail_orders_what_lies_beyond_all_items() -> None:
    """Beyond the largest reference score -ln p continues to rise, by one for each mean excess of the tail."""
    values = np.random.default_rng(0).exponential(size=2000)
    tail = TailMap.of_component(values)

    near, far = tail(np.array([values.max() + 1, values.max() + 2]))

    assert near > math.log(2001)
    assert far - near == pytest.approx(1 / tail.scale)
    assert tail.scale == pytest.approx(1.0, abs=0.2)


def test_first_variation_of_a_constant_is_large_but_finite() -> None:
    """The first emoji, with a reference without any, has a large but finite -ln p."""
    (surprise,) = TailMap.of_test(np.zeros(500))(np.array([1.0]))

    assert 30 < surprise < 40


def test_several_maps_at_once_are_each_applied_to_its_column() -> None:
    """Columns with references of different sizes, with and without a tail that varies, give what each map gives."""
    rng = np.random.default_rng(0)
    maps = [
        TailMap.of_test(np.zeros(500)),
        TailMap.of_component(rng.normal(size=80)),
        TailMap.of_test(rng.normal(size=3000)),
    ]
    scores = rng.normal(0, 3, size=(40, 3))

    together = TailMaps(maps)(scores)

    assert together.tolist() == np.stack([one(column) for one, column in zip(maps, scores.T, strict=True)], 1).tolist()
    ranks = [1 + (maps[1].reference >= score).sum() for score in scores[:, 1]]
    assert np.all(together[:, 1] >= -np.log(np.array(ranks) / 81) - 1e-12)


def test_long_references_are_thinned_to_their_quantiles() -> None:
    """Both ends and the order are preserved."""
    quantiles = thinned(np.arange(10_000.0))

    assert len(quantiles) == MAX_QUANTILES
    assert (quantiles[0], quantiles[-1]) == (0.0, 9999.0)
    assert np.all(np.diff(quantiles) > 0)
