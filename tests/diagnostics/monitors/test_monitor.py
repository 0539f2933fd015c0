"""Rolling monitors: windows, separate runs, alarms that fire for a shift and not without one."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from observed_streams import reference, rewards_and_lengths, stream

from service.diagnostics.monitors.alarms import SIGNALS, steps_of
from service.diagnostics.monitors.monitor import Monitor, Monitors, describe_state, merge_states
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import MonitorReference
from service.diagnostics.monitors.window import summarize
from service.records import Score
from service.settings import MonitorSettings

SETTINGS = MonitorSettings(window_items=512, batch_items=64, max_runs=3)


@pytest.fixture(scope="module")
def clean() -> MonitorReference:
    return reference()


def described(monitor: Monitor, known: MonitorReference | None = None) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(json.dumps(describe_state(monitor.state(), known, SETTINGS), allow_nan=False))
    return answer


def reading(answer: dict[str, Any], name: str, **which: str) -> dict[str, Any]:
    (found,) = (
        entry
        for entry in answer["monitors"]
        if entry["name"] == name and all(entry[key] == value for key, value in which.items())
    )
    return dict(found)


def fed(monitor: Monitor, seen: list[Observation], size: int = 8) -> Monitor:
    for begin in range(0, len(seen), size):
        monitor.observe(seen[begin : begin + size])
    return monitor


def test_window_rolls() -> None:
    """A window holds the latest items: at least its size, at most a batch more, and nothing older."""
    seen = stream(1000)

    found = fed(Monitor(SETTINGS, None), seen).state()

    num_items = found.statistics.num_items
    assert 512 <= num_items < 512 + 2 * 64
    rewards, lengths = rewards_and_lengths(seen[-num_items:])
    assert found.statistics.rewards.mean[0] == pytest.approx(rewards.mean(), rel=1e-12)
    corr = reading(described(fed(Monitor(SETTINGS, None), seen)), "reward_length_corr", scope="pooled")
    assert corr["value"] == pytest.approx(np.corrcoef(rewards, lengths)[0, 1], rel=1e-12)


def test_large_request_stays_whole() -> None:
    """A request larger than a batch, or than the window, is one batch: completions of a prompt stay in one batch."""
    monitor = Monitor(SETTINGS, None)
    monitor.observe(stream(100, 8))
    monitor.observe(stream(30, 8, first_prompt=100))

    found = monitor.state().statistics

    assert found.lengths_within.num_groups == 130
    assert found.num_items == 1040


def test_without_anything(clean: MonitorReference) -> None:
    """Before the first item, and without a calibration, every value is null and nothing is in alarm."""
    empty = described(Monitor(SETTINGS, clean), clean)
    bare = described(fed(Monitor(SETTINGS, None), [Observation(Score(float(n)), n) for n in range(10)]))

    for answer in (empty, bare):
        assert answer["alarms"] == []
        for entry in answer["monitors"]:
            assert entry["value"] is None or entry["name"] == "truncation_rate", entry["name"]
            assert entry["definition"]
    assert bare["cusum"]["signals"] == []
    assert [entry["signal"] for entry in empty["cusum"]["signals"]] == list(SIGNALS)


def test_every_reading_is_complete(clean: MonitorReference) -> None:
    """On a full window every monitor has a value, a definition, a sample size and, with a calibration, a reference."""
    answer = described(fed(Monitor(SETTINGS, clean), stream(300, hacked=0.05, seed=5)), clean)

    for entry in answer["monitors"]:
        if entry["feature"] in {"headers", "emoji", "hedges"}:
            assert entry["value"] is None  # constant in these streams
            continue
        assert math.isfinite(entry["value"]), entry
        assert entry["n"] > 0
        if entry["name"] not in {"tie_rate", "truncation_rate", "ood_reward_gap"} and entry["feature"] != "flattery":
            assert math.isfinite(entry["reference"]), entry
            assert entry["ess"] > 0
        low, high = entry["interval"] or (entry["value"], entry["value"])
        assert low <= entry["value"] <= high, entry
    num_items = answer["window"]["items"]
    assert num_items >= 512
    assert answer["window"]["ess"]["within"] == num_items - answer["window"]["prompts"] - 2


@pytest.mark.parametrize(
    ("slope", "states"),
    [(0.3, ["ok", "ok"]), (1.5, ["warn", "ok"]), (3.0, ["warn", "critical"])],
    ids=["none", "warn", "critical"],
)
def test_limits_of_r_and_r_squared(slope: float, states: list[str]) -> None:
    """The limits of r and of r squared are two named alarms, by the lower bound and not by the point estimate."""
    answer = described(fed(Monitor(SETTINGS, None), stream(300, slope=slope)))

    found = [reading(answer, name, scope="within") for name in ("reward_length_corr", "reward_length_r2")]

    assert [entry["state"] for entry in found] == states
    assert [entry["metric"] for entry in found] == ["pearson_r", "r_squared"]
    assert [entry["threshold"] for entry in found] == [0.3, 0.3]
    assert found[1]["value"] == pytest.approx(found[0]["value"] ** 2)
    named = [alarm["name"] for alarm in answer["alarms"] if alarm["scope"] == "within"]
    assert ("reward_length_corr" in named, "reward_length_r2" in named) == ("warn" in states, "critical" in states)


def test_clean_stream_raises_no_alarm(clean: MonitorReference) -> None:
    """Twenty thousand clean items raise no alarm of the cumulative sums."""
    monitor = fed(Monitor(SETTINGS, clean), stream(10_000, seed=7))

    assert monitor.state().num_batches > 300
    assert monitor.state().num_alarms == {}


def test_hacked_stream_raises_alarms(clean: MonitorReference) -> None:
    """Ten percent of hacked items put surprise, flags, style and length in alarm, each counted once."""
    monitor = fed(Monitor(SETTINGS, clean), stream(1000, seed=8))
    fed(monitor, stream(1000, seed=9, hacked=0.1, first_prompt=1000))

    state = monitor.state()

    assert {"surprise", "flag", "markdown", "flattery", "log_tokens"} <= set(state.num_alarms)
    assert set(state.num_alarms.values()) == {1}
    assert state.sums["surprise"].alarming_up
    raised = {(alarm["name"], alarm["severity"]) for alarm in described(monitor, clean)["alarms"]}
    assert ("cusum_surprise", "warn") in raised


def test_alarms_have_the_time_of_their_batch(clean: MonitorReference) -> None:
    """An alarm has the time at which the batch was complete with which it began, and none once it has ended."""
    now = 1_700_000_000.0
    monitor = fed(Monitor(SETTINGS, clean, lambda: now), stream(500, seed=8))
    assert described(monitor, clean)["alarms"] == []
    fed(monitor, stream(1000, seed=9, hacked=0.1, slope=3.0, first_prompt=1000))
    first = {
        alarm["name"]: alarm["since"] for alarm in described(monitor, clean)["alarms"] if alarm["scope"] != "pooled"
    }
    now += 3600.0
    fed(monitor, stream(1000, seed=10, hacked=0.1, slope=3.0, first_prompt=3000))
    later = {
        alarm["name"]: alarm["since"] for alarm in described(monitor, clean)["alarms"] if alarm["scope"] != "pooled"
    }

    assert {"ood_rate", "reward_length_corr", "reward_length_r2", "cusum_surprise"} <= set(first)
    assert set(first.values()) == {"2023-11-14T22:13:20+00:00"}
    assert first == {name: later[name] for name in first}

    fed(monitor, stream(1000, seed=11, first_prompt=6000))
    assert "reward_length_r2" not in {alarm["name"] for alarm in described(monitor, clean)["alarms"]}
    fed(monitor, stream(1000, seed=12, slope=3.0, first_prompt=8000))
    again = {alarm["name"]: alarm["since"] for alarm in described(monitor, clean)["alarms"]}
    assert again["reward_length_r2"] == "2023-11-14T23:13:20+00:00"


def test_uncertain_reference_raises_the_allowance() -> None:
    """A reference of few items has a larger allowance, because the sums would accumulate its error."""
    batch = summarize(ObservedItems.of(stream(32)), reference(100).style_thresholds)

    small, large = (steps_of(batch, reference(size))["surprise"].allowance for size in (100, 4000))

    assert small > large > 0.5
    assert large == pytest.approx(0.5 + 1.96 * math.sqrt(64 / 8000), rel=0.05)


def test_reference_survives_its_arrays(clean: MonitorReference) -> None:
    """What the artifact stores is what comes back: the same steps from the same batch."""
    copy = MonitorReference.from_arrays(clean.as_arrays() | {"other": np.zeros(3)})
    batch = summarize(ObservedItems.of(stream(100, seed=11)), clean.style_thresholds)

    assert steps_of(batch, copy) == steps_of(batch, clean)
    assert copy.clusters == clean.clusters


def test_replicas_merge_exactly(clean: MonitorReference) -> None:
    """Three replicas merged have the values of one monitor over all items, and the alarms of each of them."""
    wide = MonitorSettings(window_items=100_000, batch_items=64)
    shares = [stream(400, seed=20 + n, hacked=0.5 * (n == 2), first_prompt=1000 * n) for n in range(3)]
    replicas = [fed(Monitor(wide, clean), seen) for seen in shares]

    merged = merge_states(replica.state() for replica in replicas)
    assert merged is not None
    together = fed(Monitor(wide, clean), [item for seen in shares for item in seen])

    found, expected = (describe_state(state, clean, wide)["monitors"] for state in (merged, together.state()))
    for one, other in zip(found, expected, strict=True):
        assert other["value"] is not None or one["value"] is None
        assert one["value"] is None or one["value"] == pytest.approx(other["value"], rel=1e-9), one["name"]
        assert (one["n"], one["state"]) == (other["n"], other["state"])
    rewards, lengths = rewards_and_lengths([item for seen in shares for item in seen])
    pooled = next(entry for entry in found if entry["name"] == "reward_length_corr" and entry["scope"] == "pooled")
    assert pooled["value"] == pytest.approx(np.corrcoef(rewards, lengths)[0, 1], rel=1e-12)
    assert merged.num_replicas == 3
    assert merged.sums["surprise"].alarming_up
    assert merged.num_batches == sum(replica.state().num_batches for replica in replicas)


def test_runs_are_separate() -> None:
    """Each run has a window of its own; the common one has all items; an unknown run has none."""
    monitors = Monitors(SETTINGS, None)
    monitors.observe(stream(10, seed=1), "a")
    monitors.observe(stream(20, seed=2), "b")
    monitors.observe(stream(30, seed=3))

    def num_items(run_id: str | None) -> int | None:
        state = monitors.state(run_id)
        return None if state is None else state.statistics.num_items

    assert [num_items(run) for run in (None, "a", "b", "c")] == [120, 20, 40, None]


def test_least_recently_used_run_is_removed() -> None:
    """The number of runs is bounded: the least recently used one is removed."""
    monitors = Monitors(SETTINGS, None)
    for run in ("a", "b", "c", "a", "d"):
        monitors.observe(stream(2), run)

    assert monitors.runs == ("c", "a", "d")
    assert monitors.state("b") is None


def test_many_names_do_not_displace_a_run_in_training() -> None:
    """Names of few items displace each other and not a run with full batches, unless that has been idle for an hour."""
    now = 0.0
    monitors = Monitors(SETTINGS, None, clock=lambda: now)
    monitors.observe(stream(SETTINGS.batch_items), "training")
    for number in range(64):
        monitors.observe(stream(2), f"name-{number}")
    assert monitors.runs == ("training", "name-62", "name-63")

    now = 4000.0
    monitors.observe(stream(2), "new")
    assert monitors.runs == ("name-62", "name-63", "new")


def test_listener_receives_every_item_once() -> None:
    """The listener receives all items once, in whole requests, and the last ones by a flush."""
    received: list[Observation] = []
    monitors = Monitors(SETTINGS, None, lambda _, observations: received.extend(observations))
    requests = [stream(3, seed=n, first_prompt=3 * n) for n in range(40)]
    for seen in requests:
        monitors.observe(seen, "run")
    monitors.observe([])

    monitors.flush()
    monitors.flush()

    assert received == [item for seen in requests for item in seen]
