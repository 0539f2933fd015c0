"""What ``/v1/monitor`` and the metrics say of drift: the evidence, and what has changed, in readable units.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from service.diagnostics.monitors.drift import DriftState
from service.diagnostics.monitors.drift_moments import Vector, standardised
from service.diagnostics.monitors.drift_monitor import STATES_UNIT, DriftSubject
from service.diagnostics.monitors.shared_phrases import PLAINLY_SHARED
from service.diagnostics.phrasing import shown

NUM_CHANGES = 5
"""Changes that are named."""

NUM_SHARED = 2
"""Of them, those that only say that prompts share phrases."""

NUM_STATES = 1
"""Of them, those of the hidden states, which say that something has changed but not what."""

MIN_GAIN = 3.0
"""ln of what the bets on a change must have gained, so that it is named."""

DEFINITION = (
    "Do the completions differ from those at the start of the stream, and from the calibration's? Bets on the next "
    "batch, by single statistics and by a linear classifier that is trained online; evidence is ln of their mean "
    "gain, which exceeds the threshold by chance in at most one of false_alarm_batches batches, both comparisons "
    "together. changes names the statistics on which bets have gained most, with their values in the reference and in "
    "the recent batches; z is the difference in standard errors."
)


@dataclass(frozen=True, slots=True)
class Change:
    """One statistic that differs."""

    statistic: str
    unit: str
    reference: float
    recent: float

    z: float
    """Difference in standard errors; less, in a comparison with the calibration, what its own error may explain."""

    gain: float
    """ln of what the best bet on a difference in this direction has gained."""


def drift_alarms(state: DriftState) -> list[str]:
    """Return the names of the alarms that are on."""
    return [alarm_name(name) for name, comparison in state.comparisons.items() if comparison.alarm]


def alarm_name(comparison: str) -> str:
    """Return the name of the alarm of a comparison."""
    return f"drift_{comparison}"


def describe_drift(state: DriftState, subject: DriftSubject, false_alarm_batches: int) -> dict[str, Any]:
    """Return the state as JSON-ready values."""
    return {
        "definition": DEFINITION,
        "batches": state.num_batches,
        "false_alarm_batches": false_alarm_batches,
        "threshold": state.threshold,
        "comparisons": [
            {
                "against": name,
                "evidence": comparison.log_evidence,
                "alarm": comparison.alarm,
                "num_alarms": comparison.num_alarms,
                "recent_items": int(state.recent.counts.max(initial=0.0)),
                "changes": [asdict(change) for change in largest(changes_of(state, subject, name))],
            }
            for name, comparison in state.comparisons.items()
        ],
    }


def changes_of(state: DriftState, subject: DriftSubject, against: str) -> list[Change]:
    """Return every statistic that is known in both, in the order of the subject.

    Args:
        state: of one replica, or of several merged.
        subject: what was compared.
        against: name of the comparison.
    """
    means, counts, allowed = _reference_of(state, subject, against)
    variances = state.variances.values
    z, beyond = (standardised(state.recent, expected, counts, variances) for expected in (means, means + allowed))
    remaining = np.sign(z) * np.maximum(np.abs(z) - (z - beyond), 0.0)
    recent, gains = state.recent.values, state.comparisons[against].gains
    return [
        Change(
            statistic.name,
            statistic.unit,
            shown(statistic, float(means[index])),
            shown(statistic, float(recent[index])),
            float(remaining[index]),
            float(gains[0 if z[index] >= 0 else 1, index]),
        )
        for index, statistic in enumerate(subject.statistics)
        if state.recent.counts[index] > 0 and counts[index] > 0
    ]


def _reference_of(state: DriftState, subject: DriftSubject, against: str) -> tuple[Vector, Vector, Vector]:
    """Return the means to compare with, the items behind them, and the differences that their error may explain."""
    reference = subject.reference
    if against == "start" or reference is None:
        return state.start.values, state.start.counts, np.zeros_like(state.start.counts)
    return reference.means, reference.certainty, reference.allowed


def largest(changes: Sequence[Change]) -> list[Change]:
    """Return the changes that are named, that with the most evidence first.

    At most `NUM_SHARED` of them only say that prompts share phrases, and at most `NUM_STATES` are of the hidden states,
    which leaves room for what has changed in the text.
    """
    named = [change for change in changes if change.gain >= MIN_GAIN]
    ordered = sorted(named, key=lambda change: -change.gain)
    shared = [change.statistic for change in ordered if change.statistic in PLAINLY_SHARED]
    states = [change.statistic for change in ordered if change.unit == STATES_UNIT]
    left_out = {*shared[NUM_SHARED:], *states[NUM_STATES:]}
    return [change for change in ordered if change.statistic not in left_out][:NUM_CHANGES]
