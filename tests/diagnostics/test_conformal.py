"""Conformal p-values and the common scale of the detectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.diagnostics.conformal import MAX_QUANTILES, TailMap, conformal_p, thinned

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


def test_p_value_by_hand() -> None:
    """Of four reference items two are at least as unusual as 3: (1 + 2) / 5; beyond all of them it is 1 / 5."""
    reference = np.array([1.0, 2.0, 3.0, 4.0])

    assert conformal_p(reference, np.array([3.0, 9.0, 0.0])).tolist() == [0.6, 0.2, 1.0]


def test_no_number_is_as_unusual_as_can_be() -> None:
    """A score that is NaN gets the smallest p-value, never an ordinary one."""
    assert conformal_p(np.arange(9.0), np.array([math.nan])).tolist() == [0.1]


def test_false_alarms_keep_their_rate() -> None:
    """Whatever the distribution, fresh items of it get p <= alpha about as often as alpha says."""
    rng = np.random.default_rng(0)
    reference, fresh = np.sort(rng.standard_cauchy(4000)), rng.standard_cauchy(20_000)

    p_values = conformal_p(reference, fresh)

    for alpha in (0.01, 0.05, 0.3):
        assert (p_values <= alpha).mean() == pytest.approx(alpha, rel=0.35)


@given(st.lists(NUMBERS, min_size=2, max_size=60), st.lists(NUMBERS, min_size=2, max_size=20))
def test_a_map_never_turns_the_order_around(reference: list[float], scores: list[float]) -> None:
    """A higher score never has a smaller -ln p, on either side of the threshold, and none is NaN."""
    ordered = np.sort(np.array(scores))
    for fit in (TailMap.of_component, TailMap.of_test):
        surprises = fit(np.array(reference))(ordered)
        assert np.all(np.diff(surprises) >= -1e-9)


def test_the_tail_orders_what_lies_beyond_all_items() -> None:
    """Beyond the largest reference item ranks end, and -ln p goes on with the tail's mean excess as its unit."""
    values = np.random.default_rng(0).exponential(size=2000)
    tail = TailMap.of_component(values)

    near, far = tail(np.array([values.max() + 1, values.max() + 2]))

    assert near > math.log(2001)
    assert far - near == pytest.approx(1 / tail.scale)
    assert tail.scale == pytest.approx(1.0, abs=0.2)


def test_what_never_varied_is_loud_but_finite() -> None:
    """The first emoji ever seen, in a reference without any, is very surprising and still a number."""
    (surprise,) = TailMap.of_test(np.zeros(500))(np.array([1.0]))

    assert 30 < surprise < 40


def test_long_references_are_thinned_to_their_quantiles() -> None:
    """Both ends stay, and so does the order."""
    kept = thinned(np.arange(10_000.0))

    assert len(kept) == MAX_QUANTILES
    assert (kept[0], kept[-1]) == (0.0, 9999.0)
    assert np.all(np.diff(kept) > 0)
