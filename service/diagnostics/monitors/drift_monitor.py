"""The drift monitor of one stream: what it compares of each item, and its detector.

It holds the phrases of the latest completions as hashes, and moments. No text, and nothing of which a text could be
made, is part of its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from service.diagnostics.monitors.drift import DriftDetector, DriftState
from service.diagnostics.monitors.drift_moments import BatchMoments
from service.diagnostics.monitors.drift_reference import DriftReference
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.monitors.shared_phrases import SHARED, RecentPhrases
from service.diagnostics.states import PER_TAP
from service.diagnostics.wording import WORDING, Statistic
from service.records import StateTap


@dataclass(frozen=True, slots=True, eq=False)
class DriftSubject:
    """What is compared of every item, and with what."""

    statistics: tuple[Statistic, ...] = (*WORDING, *SHARED)
    """Of the text; then those of the hidden states, where the model has a calibration."""

    reference: DriftReference | None = None
    """Of the calibration, in the order of the statistics; None: runs are compared with their own start only."""

    @classmethod
    def of(cls, taps: Sequence[StateTap], reference: DriftReference | None) -> DriftSubject:
        """Return the subject of a model whose states are read at these taps."""
        statistics = (*WORDING, *SHARED, *state_statistics(taps))
        return cls(statistics, None if reference is None else reference.aligned([entry.name for entry in statistics]))


UNCALIBRATED = DriftSubject()


def state_statistics(taps: Sequence[StateTap]) -> tuple[Statistic, ...]:
    """Return the statistics of the states at some taps, in the order of a Score's traits."""
    return tuple(
        Statistic(f"state_{name}_{tap.pooling}_{tap.layer}", "of the hidden states") for tap in taps for name in PER_TAP
    )


def compared_values(
    items: Sequence[Observation], phrases: RecentPhrases, num_states: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return what is compared of items, and their prompts; items of which no text is known are left out.

    Args:
        items: in order of arrival.
        phrases: of earlier items; those of the items are added.
        num_states: statistics of the hidden states.

    Returns:
        float64 [items, statistics], NaN where a value is unknown, and a number for each prompt, int64 [items].
    """
    of_prompt: dict[int, list[Observation]] = {}
    for item in items:
        if item.wording is not None:
            of_prompt.setdefault(item.wording.prompt, []).append(item)
    members = list(of_prompt.values())
    wordings = [item.wording for group in members for item in group if item.wording is not None]
    if not wordings:
        return np.empty((0, len(WORDING) + len(SHARED) + num_states)), np.empty(0, np.int64)
    prompts = np.repeat(np.arange(len(members)), [len(group) for group in members])
    shared = phrases.compare(wordings, prompts)
    worded = np.stack([wording.values for wording in wordings])
    states = np.full((len(worded), num_states), np.nan)
    for row, item in zip(states, chain.from_iterable(members), strict=True):
        traits = item.score.traits
        if traits is not None and len(traits) == num_states:
            row[:] = traits
    states[~np.isfinite(states)] = np.nan
    return np.concatenate([worded, shared, states], axis=1), prompts


class DriftMonitor:
    """Compares a stream of items with its start and with the calibration.

    Args:
        subject: what is compared.
        false_alarm_batches: designed mean number of batches between two false alarms of all comparisons together.
    """

    def __init__(self, subject: DriftSubject, false_alarm_batches: int) -> None:
        self._num_states = len(subject.statistics) - len(WORDING) - len(SHARED)
        self._phrases = RecentPhrases()
        scarce = np.array([statistic.scarce for statistic in subject.statistics])
        self._detector = DriftDetector(scarce, subject.reference, false_alarm_batches)

    def observe(self, batch: Sequence[Observation]) -> None:
        """Compare a batch; all completions of a prompt within a request must be in it."""
        values, prompts = compared_values(batch, self._phrases, self._num_states)
        if len(values):
            self._detector.step(BatchMoments.of(values, prompts))

    def state(self) -> DriftState:
        """Return the state by value."""
        return self._detector.state()
