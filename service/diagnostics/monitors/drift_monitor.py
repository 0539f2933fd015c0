"""The drift monitor of one stream: what it compares of each item, and its detector.

It holds statistics and hashes of the completions of the unfinished batch, and moments. No text is part of its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.diagnostics.monitors.drift import DriftDetector, DriftState
from service.diagnostics.monitors.drift_moments import BatchMoments
from service.diagnostics.monitors.drift_reference import DriftReference
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.monitors.shared_phrases import NUM_PROMPTS, SHARED, share_phrases
from service.diagnostics.phrasing import WORDING, Statistic
from service.diagnostics.states import PER_TAP
from service.records import StateTap


@dataclass(frozen=True, slots=True, eq=False)
class DriftSubject:
    """What is compared of every item, and with what."""

    statistics: tuple[Statistic, ...] = (*WORDING, *SHARED)
    """Of the text; then those of the hidden states, where the model has a calibration."""

    reference: DriftReference | None = None
    """Of the calibration, in the order of the statistics; None: runs are compared with their own start only."""

    @classmethod
    def of(
        cls, taps: Sequence[StateTap], reference: DriftReference | None, num_prompts: int = NUM_PROMPTS
    ) -> DriftSubject:
        """Return the subject of a model.

        Args:
            taps: where its states are read.
            reference: of its calibration, which has batches of `NUM_PROMPTS` prompts.
            num_prompts: prompts of a batch. The more there are, the more phrases are shared, so with another number
                these have no reference.
        """
        statistics = (*WORDING, *SHARED, *state_statistics(taps))
        if reference is None:
            return cls(statistics)
        if num_prompts != NUM_PROMPTS:
            reference = reference.without({entry.name for entry in SHARED})
        return cls(statistics, reference.aligned([entry.name for entry in statistics]))


UNCALIBRATED = DriftSubject()

MIN_PROMPTS = 8
"""Different prompts of a batch that is compared. Completions of one prompt may be as similar as they like, so with
fewer prompts it is not known how much the mean of a batch varies."""

MAX_COMPLETIONS = 16
"""Completions of a prompt in a request that are compared, the first ones; more would say little more of the stream."""


STATES_UNIT = "of the hidden states"


def state_statistics(taps: Sequence[StateTap]) -> tuple[Statistic, ...]:
    """Return the statistics of the states at some taps, in the order of a Score's traits."""
    return tuple(Statistic(f"state_{name}_{tap.pooling}_{tap.layer}", STATES_UNIT) for tap in taps for name in PER_TAP)


def batch_moments(groups: Sequence[Sequence[Observation]], num_states: int) -> BatchMoments:
    """Return the moments of what is compared of items.

    Args:
        groups: items of one prompt each, all with a known wording; those of equal prompts count as one prompt.
        num_states: statistics of the hidden states.
    """
    items = [item for group in groups for item in group]
    wordings = [item.wording for item in items if item.wording is not None]
    numbers: dict[int, int] = {}
    prompts = np.array([numbers.setdefault(wording.prompt, len(numbers)) for wording in wordings], np.int64)
    shared = share_phrases(wordings, prompts)
    states = np.full((len(items), num_states), np.nan)
    for row, item in zip(states, items, strict=True):
        traits = item.score.traits
        if traits is not None and len(traits) == num_states:
            row[:] = traits
    states[~np.isfinite(states)] = np.nan
    worded = np.stack([wording.values for wording in wordings])
    lent = np.zeros((len(numbers), worded.shape[1] + len(SHARED) + num_states))
    lent[:, worded.shape[1] : worded.shape[1] + len(SHARED)] = shared.lent
    return BatchMoments.of(np.concatenate([worded, shared.values, states], axis=1), prompts, lent)


def groups_of(items: Sequence[Observation]) -> list[list[Observation]]:
    """Return the items by prompt, at most `MAX_COMPLETIONS` of each; those of which no text is known are left out."""
    groups: dict[int, list[Observation]] = {}
    for item in items:
        if item.wording is not None:
            groups.setdefault(item.prompt, []).append(item)
    return [group[:MAX_COMPLETIONS] for group in groups.values()]


def _num_prompts(groups: Sequence[Sequence[Observation]]) -> int:
    """Return the number of different prompts of groups, all with a known wording."""
    return len({item.wording.prompt for group in groups for item in group if item.wording is not None})


class DriftMonitor:
    """Compares a stream of items with its start and with the calibration, in batches of prompts.

    Batches of fewer than `MIN_PROMPTS` different prompts are left out.

    Args:
        subject: what is compared.
        false_alarm_batches: designed mean number of batches between two false alarms of all comparisons together.
        num_prompts: prompts of a batch; the same for which the subject was made.
    """

    def __init__(self, subject: DriftSubject, false_alarm_batches: int, num_prompts: int = NUM_PROMPTS) -> None:
        self._num_prompts = num_prompts
        self._num_states = len(subject.statistics) - len(WORDING) - len(SHARED)
        self._pending: list[list[Observation]] = []
        scarce = np.array([statistic.scarce for statistic in subject.statistics])
        self._detector = DriftDetector(scarce, subject.reference, false_alarm_batches)

    def observe(self, items: Sequence[Observation]) -> None:
        """Add items; all completions of a prompt within a request must be among them."""
        self._pending += groups_of(items)
        while len(self._pending) >= self._num_prompts:
            batch = self._pending[: self._num_prompts]
            if _num_prompts(batch) >= MIN_PROMPTS:
                self._detector.step(batch_moments(batch, self._num_states))
            del self._pending[: self._num_prompts]

    def state(self) -> DriftState:
        """Return the state by value, as of the last full batch."""
        return self._detector.state()
