"""The distributions of a window: every item counts once, in the bins that are drawn, and merged windows add up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from observed_streams import reference, stream

from service.diagnostics.monitors.distributions import MAX_POINTS, NO_ITEMS, describe_distributions, numbers_of
from service.diagnostics.monitors.monitor import Monitor, merge_states
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.reference import Reference
from service.records import Score
from service.settings import MonitorSettings

SETTINGS = MonitorSettings(window_items=512, batch_items=64)


def test_histograms_count_every_known_value() -> None:
    """Rewards and p-values count once each; p-values fall into twentieths; reference shares are the calibration's."""
    seen = stream(300)
    rewards = np.array([item.score.reward for item in seen])
    known = Reference.of(np.sort(np.random.default_rng(3).normal(size=2000)))

    found = describe_distributions(numbers_of(seen), known, 0.05)

    assert found["alpha"] == 0.05
    histogram = found["reward"]
    assert sum(histogram["counts"]) == 600
    assert sum(histogram["reference"]) == pytest.approx(1.0, abs=1e-3)
    inner = np.histogram(rewards, histogram["edges"])[0][1:-1]
    assert np.abs(np.array(histogram["counts"][1:-1]) - inner).max() <= 1  # edges are rounded to four digits
    p_values = np.array([item.score.ood.p_value for item in seen if item.score.ood])
    assert found["p_value"]["counts"] == np.histogram(p_values, np.linspace(0, 1, 21))[0].tolist()


def test_points_are_a_bounded_sample_of_pairs() -> None:
    """At most so many items are listed, evenly spaced, each with its own reward, length and p-value."""
    seen = stream(1500)

    points = describe_distributions(numbers_of(seen), None, 0.01)["points"]

    assert points["every"] == 8
    assert len(points["reward"]) == 375 <= MAX_POINTS
    chosen = seen[::8]
    assert points["reward"] == pytest.approx([item.score.reward for item in chosen], abs=1e-4)
    assert points["completion_tokens"] == [item.num_completion_tokens for item in chosen]
    assert points["p_value"] == pytest.approx([item.score.ood.p_value for item in chosen if item.score.ood], abs=1e-5)


def test_unknown_values_are_left_out() -> None:
    """Without a calibration and without lengths there are no p-values and no points, and the answer is JSON."""
    seen = [Observation(Score(float(number)), number) for number in range(4)]

    found = describe_distributions(numbers_of(seen), None, 0.01)

    assert sum(found["reward"]["counts"]) == 4
    assert found["reward"]["reference"] is None
    assert sum(found["p_value"]["counts"]) == 0
    assert found["points"]["reward"] == []
    json.dumps(found, allow_nan=False)
    assert describe_distributions(NO_ITEMS, None, 0.01)["reward"]["counts"] == []
    constant = describe_distributions(numbers_of([Observation(Score(2.0), 1)] * 3), None, 0.01)
    assert sum(constant["reward"]["counts"]) == 3


def test_items_roll_with_the_window_and_merge() -> None:
    """The items of a state are those of its statistics, the unfinished batch included; replicas add up."""
    monitors = [Monitor(SETTINGS, reference(200)) for _ in range(2)]
    for number, monitor in enumerate(monitors):
        seen = stream(700, seed=number)
        for begin in range(0, len(seen), 10):
            monitor.observe(seen[begin : begin + 10])
    states = [monitor.state() for monitor in monitors]

    merged = merge_states(states)

    assert merged is not None
    assert [len(state.items) for state in states] == [state.statistics.num_items for state in states]
    assert states[0].items[-1, 0] == np.float32(stream(700, seed=0)[-1].score.reward)
    assert len(merged.items) == merged.statistics.num_items
