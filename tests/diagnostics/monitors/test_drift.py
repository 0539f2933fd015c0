"""The drift detector: a test by betting with a designed false-alarm rate, which names what has changed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from service.diagnostics.monitors.bets import Bets
from service.diagnostics.monitors.drift import RECENT_BATCHES, START_BATCHES, DriftDetector, DriftState
from service.diagnostics.monitors.drift_moments import BatchMoments
from service.diagnostics.monitors.drift_monitor import STATES_UNIT, DriftSubject
from service.diagnostics.monitors.drift_reference import DriftReference
from service.diagnostics.monitors.drift_report import Change, changes_of, describe_drift, drift_alarms, largest
from service.diagnostics.phrasing import Statistic

STATISTICS = (
    Statistic("level", "units"),
    Statistic("count", "per answer", scarce=1.0),
    Statistic("size", "words", scale="log"),
)
SCARCE = np.array([statistic.scarce for statistic in STATISTICS])
PROMPTS = np.repeat(np.arange(64), 4)


def values(rng: np.random.Generator, shift: float = 0.0) -> NDArray[np.float64]:
    """Four completions of each prompt: correlated, one statistic rare and skewed."""
    topics = rng.normal(size=(64, 3))[PROMPTS]
    found = topics + rng.normal(size=(256, 3))
    found[:, 1] = (rng.random(256) < 0.01) * rng.exponential(2.0, 256)
    found[:, 2] += 3.0
    found[:, 0] += shift
    return found


def batch(rng: np.random.Generator, shift: float = 0.0) -> BatchMoments:
    return BatchMoments.of(values(rng, shift), PROMPTS)


def reference(rng: np.random.Generator, num: int = 20) -> DriftReference:
    """The means of as many batches."""
    found = BatchMoments.of(np.concatenate([values(rng) for _ in range(num)]), np.arange(256 * num) // 4)
    names = tuple(statistic.name for statistic in STATISTICS)
    return DriftReference(names, found.means, np.sqrt(np.diag(found.scatter)) / found.counts, 256 * num)


def fed(detector: DriftDetector, rng: np.random.Generator, shifts: list[float]) -> DriftState:
    for shift in shifts:
        detector.step(batch(rng, shift))
    return detector.state()


def test_moments_account_for_prompts() -> None:
    """The variance of a batch's mean is that over repeated batches, although completions of a prompt are similar."""
    rng = np.random.default_rng(0)
    batches = [batch(rng) for _ in range(400)]

    expected = np.var([found.means for found in batches], axis=0)
    estimated = np.mean([np.diag(found.scatter) / found.counts**2 for found in batches], axis=0)

    assert estimated == pytest.approx(expected, rel=0.25)
    assert estimated[0] > 2 * 2.0 / 256  # that of as many independent items, twice


def test_unknown_values_count_for_no_column() -> None:
    """A value that is not known changes neither the mean of its column nor the others."""
    rows = np.array([[1.0, 5.0, np.nan], [3.0, np.nan, np.nan]])

    found = BatchMoments.of(rows, np.array([0, 1]))

    assert found.counts.tolist() == [2, 1, 0]
    assert found.means.tolist() == [2.0, 5.0, 0.0]
    assert found.scatter[0, 0] == 2.0
    assert BatchMoments.of(rows[:0], np.empty(0, np.int64)).counts.tolist() == [0, 0, 0]


def test_a_bet_gains_nothing_while_nothing_changes() -> None:
    """The factors of all bets on normal and on skewed batches have a mean of at most 1."""
    rng = np.random.default_rng(1)
    skewed = (rng.poisson(2.0, 200_000) - 2.0) / math.sqrt(2.0)
    normal = rng.normal(size=200_000)

    for drawn, skewness in ((normal, 0.0), (skewed, 1 / math.sqrt(2.0))):
        bets = Bets(len(drawn), 0)
        bets.place(np.stack([drawn, -drawn]), np.full(len(drawn), skewness), np.empty(0))
        factors = np.exp(bets._single).mean(axis=2)
        assert (factors <= 1.03).all()


def test_clean_streams_raise_few_alarms() -> None:
    """A design of one false alarm in a hundred batches raises at most as many, with small and with large references."""
    alarms = 0
    for seed in range(8):
        rng = np.random.default_rng(100 + seed)
        state = fed(DriftDetector(SCARCE, reference(rng), 100), rng, [0.0] * 200)
        alarms += sum(found.num_alarms for found in state.comparisons.values())

    assert alarms <= 16


def test_a_slow_drift_is_detected_and_named() -> None:
    """A mean that rises by a hundredth of a standard deviation a batch raises both alarms and is named first."""
    rng = np.random.default_rng(2)
    subject = DriftSubject(STATISTICS, reference(rng))
    state = fed(DriftDetector(SCARCE, subject.reference, 10_000), rng, [0.014 * number for number in range(60)])

    assert drift_alarms(state) == ["drift_start", "drift_calibration"]
    described = describe_drift(state, subject, 10_000)
    for found in described["comparisons"]:
        assert found["evidence"] > described["threshold"] == math.log(20_000)
        assert found["changes"][0]["statistic"] == "level"
        assert found["changes"][0]["recent"] == pytest.approx(0.014 * (60 - RECENT_BATCHES / 2), abs=0.1)
        assert found["changes"][0]["z"] > 4
    assert described["comparisons"][0]["changes"][0]["reference"] == pytest.approx(0.014 * START_BATCHES / 2, abs=0.1)


@pytest.mark.parametrize("num_shifted", [1, 3, 8])
def test_an_early_alarm_names_what_has_changed(num_shifted: int) -> None:
    """While batches are few the recent ones are not those of the start, so the change has its size and direction."""
    rng = np.random.default_rng(3)
    detector = DriftDetector(SCARCE, None, 10_000)

    state = fed(detector, rng, [0.0] * 4 + [-2.0] * num_shifted)

    change = changes_of(state, DriftSubject(STATISTICS, None), "start")[0]
    assert change.reference == pytest.approx(0.0, abs=0.3)
    assert change.recent == pytest.approx(-2.0, abs=0.4)
    assert change.z < -5
    assert change.gain > 0
    assert state.recent.counts[0] == 256 * num_shifted


def test_a_logarithm_is_shown_in_its_unit() -> None:
    """The mean of a logarithm is shown as the number that it is the logarithm of."""
    rng = np.random.default_rng(3)
    state = fed(DriftDetector(SCARCE, None, 10_000), rng, [0.0] * 10)

    (size,) = (found for found in changes_of(state, DriftSubject(STATISTICS), "start") if found.statistic == "size")

    assert size.recent == pytest.approx(math.expm1(3.0), rel=0.1)


def test_shared_phrases_leave_room_for_what_they_are() -> None:
    """Changes are named by their gain, at most five, at most two of those that only say that phrases are shared."""
    gains = {
        "shared_phrases": 9.0, "shared_endings": 8.0, "widely_shared_phrases": 7.0, "widely_shared_endings": 6.0,
        "widely_shared_phrases_with_praise_words": 5.0, "words": 4.0, "commas": 3.5, "digits": 3.2, "capitals": 2.9,
    }  # fmt: skip
    changes = [Change(name, "units", 0.0, 1.0, 4.0, gain) for name, gain in reversed(gains.items())]

    named = [change.statistic for change in largest(changes)]

    assert named == ["shared_phrases", "shared_endings", "widely_shared_phrases_with_praise_words", "words", "commas"]


def test_hidden_states_leave_room_for_the_text() -> None:
    """At most one of the changes that are named is of the hidden states, which do not say what has changed."""
    gains = {"norm": 9.0, "cosine": 8.0, "residual": 7.0, "hedging_words": 4.0, "words": 3.5}
    changes = [
        Change(name, "per 100 words" if "words" in name else STATES_UNIT, 0.0, 1.0, 4.0, gain)
        for name, gain in gains.items()
    ]

    assert [change.statistic for change in largest(changes)] == ["norm", "hedging_words", "words"]


def test_an_alarm_ends_when_the_stream_returns() -> None:
    """The alarm ends when recent batches are as before, is counted once, and can begin again."""
    rng = np.random.default_rng(4)
    detector = DriftDetector(SCARCE, None, 10_000)

    during = fed(detector, rng, [0.0] * 40 + [1.0] * 10)
    after = fed(detector, rng, [0.0] * 15)
    again = fed(detector, rng, [-1.0] * 10)

    assert [drift_alarms(state) for state in (during, after, again)] == [["drift_start"], [], ["drift_start"]]
    assert again.comparisons["start"].num_alarms == 2


def test_one_unusual_batch_is_not_drift() -> None:
    """A single batch, however far away, raises no alarm."""
    rng = np.random.default_rng(5)
    detector = DriftDetector(SCARCE, None, 10_000)

    assert drift_alarms(fed(detector, rng, [0.0] * 40 + [50.0])) == []
    assert drift_alarms(fed(detector, rng, [0.0] * 10)) == []


def test_what_is_known_of_few_items_is_not_bet_on() -> None:
    """A statistic that is known for a few items of each batch, whatever its values, raises no alarm."""
    rng = np.random.default_rng(10)
    detector = DriftDetector(SCARCE, None, 10_000)
    for number in range(40):
        found = values(rng, 100.0 * (number > 20))
        found[5:, 0] = np.nan
        detector.step(BatchMoments.of(found, PROMPTS))

    assert drift_alarms(detector.state()) == []


def test_batches_that_vary_by_themselves_are_not_drift() -> None:
    """Batches whose means vary more than their prompts explain, as those of changing topics do, raise no alarm."""
    rng = np.random.default_rng(6)
    detector = DriftDetector(SCARCE, None, 10_000)

    state = fed(detector, rng, rng.normal(0.0, 0.3, 300).tolist())

    assert state.comparisons["start"].num_alarms == 0


def test_a_calibration_may_differ_by_its_own_error() -> None:
    """A stream that differs from a small calibration by less than its error raises no alarm, by more it does."""
    rng = np.random.default_rng(7)
    exact = reference(rng, 200)
    shifted = [
        DriftReference(exact.columns, exact.means + np.array([shift, 0, 0]), np.full(3, 0.1), 500)
        for shift in (0.2, 0.8)
    ]

    alarms = [drift_alarms(fed(DriftDetector(SCARCE, found, 10_000), rng, [0.0] * 60)) for found in shifted]

    assert alarms == [[], ["drift_calibration"]]


def test_replicas_merge_exactly() -> None:
    """The merged means are those of all items of the replicas, and an alarm of either is one of both."""
    rng = np.random.default_rng(8)
    quiet, drifting = DriftDetector(SCARCE, None, 10_000), DriftDetector(SCARCE, None, 10_000)
    batches = [values(rng) for _ in range(8)]
    for one, other in zip(batches[:4], batches[4:], strict=True):
        quiet.step(BatchMoments.of(one, PROMPTS))
        drifting.step(BatchMoments.of(other, PROMPTS))
    early = quiet.state().merged(drifting.state())
    together = np.concatenate(batches)

    late = quiet.state().merged(fed(drifting, rng, [0.0] * 30 + [1.0] * 8))

    assert early.recent.values == pytest.approx(together.mean(axis=0), rel=1e-12)
    assert early.recent.counts.tolist() == [2048.0] * 3
    assert early.num_batches == 8
    assert drift_alarms(late) == ["drift_start"]
    assert late.comparisons["start"].log_evidence >= late.threshold


def test_a_reference_is_aligned_by_name() -> None:
    """A calibration that knows other statistics serves for those that it knows."""
    known = DriftReference(("level", "older"), np.array([1.0, 2.0]), np.array([0.1, 0.2]), 100)

    found = known.aligned(["count", "level"])

    assert found.columns == ("count", "level")
    assert math.isnan(found.means[0])
    assert found.means[1] == 1.0
    assert found.certainty.tolist() == [0.0, math.inf]


def test_a_reference_survives_its_file() -> None:
    """What is packed is unpacked; a file without it, or with another version's, has none; a damaged one is refused."""
    known = reference(np.random.default_rng(9), 2)
    arrays: dict[str, NDArray[np.float64]] = {}
    shapes: dict[str, object] = {}
    known.pack(arrays, shapes)

    copy = DriftReference.unpack(arrays, shapes)

    assert copy is not None
    assert (copy.columns, copy.num_items) == (known.columns, known.num_items)
    assert copy.means.tolist() == known.means.tolist()
    assert DriftReference.unpack({}, {}) is None
    assert DriftReference.unpack(arrays, {"drift": {**shapes["drift"], "version": "0"}}) is None  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="number"):
        DriftReference.unpack({**arrays, "drift_means": np.zeros(1)}, shapes)
