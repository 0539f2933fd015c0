"""The drift monitor in a stream of items: alarms, what they name, metrics, and that no text is exposed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from observed_streams import HEDGE, stream, worded_stream
from prometheus_client.parser import text_string_to_metric_families

from export.calibration.drift import drift_reference
from service.diagnostics.monitors.drift_monitor import (
    MAX_COMPLETIONS,
    MIN_PROMPTS,
    UNCALIBRATED,
    DriftMonitor,
    DriftSubject,
    batch_moments,
    groups_of,
    state_statistics,
)
from service.diagnostics.monitors.drift_report import changes_of
from service.diagnostics.monitors.monitor import (
    Monitor,
    Monitors,
    MonitorView,
    describe_state,
    merge_states,
    merge_views,
)
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.monitors.publisher import watch_stream
from service.diagnostics.monitors.shared_phrases import NUM_PROMPTS, SHARED
from service.diagnostics.phrasing import WORDING
from service.metrics import Metrics
from service.records import Score, StateTap
from service.settings import MonitorSettings

SETTINGS = MonitorSettings(window_items=512, batch_items=64)
TAPS = (StateTap(3, "mean"), StateTap(4, "last"))


@pytest.fixture(scope="module")
def calibrated() -> DriftSubject:
    """A subject whose calibration has the made-up words."""
    return DriftSubject.of((), drift_reference(groups_of(worded_stream(640, seed=1, first_prompt=90_000)), ()))


def fed(monitor: Monitor | Monitors, items: Sequence[Observation]) -> None:
    for begin in range(0, len(items), 16):
        monitor.observe(items[begin : begin + 16])


def drifting(monitor: Monitor | Monitors) -> None:
    """Six clean batches, then six that hedge ever more."""
    fed(monitor, worded_stream(6 * NUM_PROMPTS, seed=2))
    for step in range(6):
        fed(monitor, worded_stream(NUM_PROMPTS, seed=10 + step, hedged=(step + 1) / 10, first_prompt=1000 * (step + 1)))


def described(monitor: Monitor, subject: DriftSubject) -> dict[str, Any]:
    answer = describe_state(monitor.state(), None, SETTINGS, (), subject)
    found: dict[str, Any] = json.loads(json.dumps(answer, allow_nan=False))
    return found


def test_a_slow_drift_is_in_the_answer(calibrated: DriftSubject) -> None:
    """Both comparisons alarm, with the time, and name the hedge by what it is; the text is nowhere."""
    monitor = Monitor(SETTINGS, None, lambda: 1_700_000_000.0, calibrated)

    drifting(monitor)

    answer = described(monitor, calibrated)
    assert [(alarm["name"], alarm["severity"], alarm["since"]) for alarm in answer["alarms"]] == [
        ("drift_start", "warn", "2023-11-14T22:13:20+00:00"),
        ("drift_calibration", "warn", "2023-11-14T22:13:20+00:00"),
    ]
    for comparison in answer["drift"]["comparisons"]:
        assert comparison["alarm"]
        assert comparison["num_alarms"] == 1
        assert comparison["evidence"] > answer["drift"]["threshold"]
        named = {change["statistic"] for change in comparison["changes"]}
        assert named & {"hedging_words", "widely_shared_phrases_with_hedging_words", "shared_endings"}
        assert all(change["recent"] > change["reference"] for change in comparison["changes"][:1])
    text = json.dumps(answer) + repr(monitor.state())
    assert not any(phrase in text for phrase in (HEDGE, "might well depend", "you see it"))


def test_a_clean_stream_raises_no_alarm(calibrated: DriftSubject) -> None:
    """A stream like the calibration's raises no alarm and names next to nothing."""
    monitor = Monitor(SETTINGS, None, subject=calibrated)

    fed(monitor, worded_stream(12 * NUM_PROMPTS, seed=3))

    answer = described(monitor, calibrated)
    assert answer["alarms"] == []
    assert answer["drift"]["batches"] == 12
    assert all(abs(change["z"]) < 4.5 for found in answer["drift"]["comparisons"] for change in found["changes"])
    assert all(found["recent_items"] == 16 * NUM_PROMPTS for found in answer["drift"]["comparisons"])


def test_without_a_calibration_the_start_is_compared_with() -> None:
    """Without a calibration, and for items without a known text, there is one comparison, which is empty at first."""
    monitor = Monitor(SETTINGS, None)
    empty = described(monitor, UNCALIBRATED)["drift"]
    fed(monitor, stream(200))  # no wording: templated texts

    found = described(monitor, UNCALIBRATED)["drift"]

    assert [comparison["against"] for comparison in found["comparisons"]] == ["start"]
    assert found["comparisons"] == empty["comparisons"]
    assert found["batches"] == 0
    assert found["threshold"] == math.log(SETTINGS.false_alarm_batches)


def test_replicas_are_merged(calibrated: DriftSubject) -> None:
    """The view of two replicas has the alarm of one of them, and the means of both."""
    quiet, other = (Monitor(SETTINGS, None, subject=calibrated) for _ in range(2))
    fed(quiet, worded_stream(400, seed=4, first_prompt=50_000))
    drifting(other)

    merged = merge_states([quiet.state(), other.state()])

    assert merged is not None
    assert merged.drift.comparisons["start"].alarm
    assert merged.drift.num_batches == quiet.state().drift.num_batches + other.state().drift.num_batches
    parts = [monitor.state().drift.recent for monitor in (quiet, other)]
    assert merged.drift.recent.sums == pytest.approx(parts[0].sums + parts[1].sums, rel=1e-12)


def test_a_replica_of_another_calibration_is_left_out(calibrated: DriftSubject) -> None:
    """Of replicas with different calibrations, those like the first are merged, and the answer is incomplete."""
    with_, without = Monitor(SETTINGS, None, subject=calibrated), Monitor(SETTINGS, None)
    for monitor in (with_, without):
        fed(monitor, worded_stream(2 * NUM_PROMPTS, seed=3))
    views = [
        MonitorView(with_.state(), ("a",), build="model calibration"),
        MonitorView(without.state(), ("b",), build="model"),
        MonitorView(with_.state(), ("c",), build="model calibration"),
    ]

    merged = merge_views(views, incomplete=False)
    turned = merge_views([views[1], views[0], views[2]], incomplete=False)

    assert merged.state is not None
    assert turned.state is not None
    assert (merged.state.num_replicas, merged.runs, merged.incomplete) == (2, ("a", "c"), True)
    assert (turned.state.num_replicas, turned.runs, turned.incomplete) == (1, ("b",), True)
    assert set(merged.state.drift.comparisons) == {"start", "calibration"}
    assert not merge_views([views[0], views[2]], incomplete=False).incomplete


def test_metrics_show_evidence_alarm_and_changes(calibrated: DriftSubject) -> None:
    """The metrics have the evidence of both comparisons, their alarms, and every statistic's change."""
    metrics = Metrics()
    monitors = watch_stream(metrics, None, SETTINGS, calibrated)
    before = samples(metrics)

    drifting(monitors)

    found = samples(metrics)
    for against in ("start", "calibration"):
        assert before["rm_alarms_total", ("signal", f"drift_{against}")] == 0.0
        assert found["rm_alarms_total", ("signal", f"drift_{against}")] == 1.0
        assert found["rm_alarm", ("severity", "warn"), ("signal", f"drift_{against}")] == 1.0
        assert found["rm_drift_evidence", ("against", against)] > found["rm_drift_threshold",]
        assert found["rm_drift_change", ("against", against), ("statistic", "shared_endings")] > 4.0
    names = {key[2][1] for key in found if key[0] == "rm_drift_change"}
    assert names <= {statistic.name for statistic in (*WORDING, *SHARED)}


def test_runs_are_compared_with_their_own_start() -> None:
    """A run that drifts is in alarm, and another one that sends at the same time is not."""
    monitors = Monitors(SETTINGS, None)
    for batch in range(10):
        steady = worded_stream(NUM_PROMPTS, seed=batch, first_prompt=1000 * batch)
        hedged = worded_stream(NUM_PROMPTS, seed=100 + batch, hedged=max(0, batch - 5) / 5, first_prompt=1000 * batch)
        for begin in range(0, 2 * NUM_PROMPTS, 16):
            monitors.observe(steady[begin : begin + 16], "steady")
            monitors.observe(hedged[begin : begin + 16], "drifting")

    alarms = {}
    for run in ("steady", "drifting"):
        state = monitors.state(run)
        assert state is not None
        alarms[run] = state.drift.comparisons["start"].alarm

    assert alarms == {"steady": False, "drifting": True}


def test_batches_have_a_fixed_number_of_prompts() -> None:
    """However requests are cut, batches have the same prompts, so that shared phrases do not depend on the load."""
    items = worded_stream(3 * NUM_PROMPTS + 5, seed=5)
    small, large = DriftMonitor(UNCALIBRATED, 10_000), DriftMonitor(UNCALIBRATED, 10_000)

    for begin in range(0, len(items), 2):
        small.observe(items[begin : begin + 2])
    large.observe(items)

    assert small.state().num_batches == large.state().num_batches == 3
    assert small.state().recent.sums == pytest.approx(large.state().recent.sums, rel=1e-12)


@pytest.mark.parametrize("num_prompts", [1, 2, MIN_PROMPTS - 1])
def test_a_stream_of_few_prompts_is_not_compared(num_prompts: int) -> None:
    """Of one prompt, or a few, it is not known how much batches vary, so such batches are left out."""
    monitor = DriftMonitor(UNCALIBRATED, 10_000)

    for number, item in enumerate(worded_stream(6 * NUM_PROMPTS, seed=9)):
        assert item.wording is not None
        prompt = number % num_prompts
        monitor.observe([replace(item, prompt=prompt, wording=replace(item.wording, prompt=prompt))])

    state = monitor.state()
    assert state.num_batches == 0
    assert not any(comparison.alarm or comparison.log_evidence for comparison in state.comparisons.values())


@pytest.mark.parametrize("num_prompts", [MIN_PROMPTS, 4 * MIN_PROMPTS])
def test_a_clean_stream_of_not_many_prompts_raises_no_alarm(num_prompts: int) -> None:
    """With as few prompts as are compared there is no alarm, although each occurs again and again."""
    for seed in range(5):
        monitor = DriftMonitor(UNCALIBRATED, 10_000)
        for number, item in enumerate(worded_stream(15 * NUM_PROMPTS // 2, seed=20 + seed)):
            assert item.wording is not None
            prompt = number % num_prompts
            monitor.observe([replace(item, prompt=prompt, wording=replace(item.wording, prompt=prompt))])

        assert monitor.state().num_batches == 15
        assert not any(comparison.alarm for comparison in monitor.state().comparisons.values())


def test_smaller_batches_answer_sooner(calibrated: DriftSubject) -> None:
    """With 32 prompts a batch a run has four times as many, and phrases that prompts share have no reference."""
    subject = DriftSubject.of((), calibrated.reference, 32)
    monitor = Monitor(SETTINGS.model_copy(update={"drift_prompts": 32}), None, subject=subject)
    fed(monitor, worded_stream(6 * NUM_PROMPTS, seed=8))

    state = monitor.state().drift
    names = [statistic.name for statistic in subject.statistics]
    compared = {change.statistic for change in changes_of(state, subject, "calibration")}
    assert state.num_batches == 24
    assert {change.statistic for change in changes_of(state, subject, "start")} >= {entry.name for entry in SHARED}
    assert compared == set(names) - {"token_surprisal"} - {entry.name for entry in SHARED}
    assert not any(comparison.alarm for comparison in state.comparisons.values())


def test_a_prompt_with_many_completions_takes_limited_memory() -> None:
    """Of a prompt the first completions are compared; items without a known text are left out."""
    (item, *_) = worded_stream(1, seed=6)
    bare = Observation(Score(0.0), 7)

    (group,) = groups_of([bare, *[item] * 100])

    assert len(group) == MAX_COMPLETIONS


def test_states_are_compared_where_they_are_known() -> None:
    """The traits of a Score are compared by tap; values that are not finite, or of another model, are unknown."""
    statistics = state_statistics(TAPS)
    traits = [(1.0,) * 10, (2.0,) * 10, (math.inf,) * 10, None, (1.0,) * 4, (3.0,) * 10]
    items = [
        Observation(Score(0.0, traits=found), item.prompt, wording=item.wording)
        for item, found in zip(worded_stream(3, seed=7), traits, strict=True)
    ]

    moments = batch_moments(groups_of(items), len(statistics))

    assert statistics[5].name == "state_distance_last_4"
    assert moments.counts.tolist() == [6.0] * (len(WORDING) - 1) + [0.0] + [6.0] * len(SHARED) + [3.0] * 10
    assert moments.means[-10:].tolist() == [2.0] * 10


def samples(metrics: Metrics) -> dict[tuple[Any, ...], float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }
