"""Fits the drift monitor's reference: what it compares, on average over the calibration's items.

The items of the part ``fit_states`` are left out, because states and surprisal of the texts that their own means and
counts were fitted to look too typical.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from export.calibration.measured_parts import NUM_TEXT, MeasuredItems, MeasuredParts
from service.diagnostics.monitors.drift_moments import BatchMoments
from service.diagnostics.monitors.drift_monitor import DriftSubject, compared_values, state_statistics
from service.diagnostics.monitors.drift_reference import DriftReference
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.monitors.shared_phrases import RecentPhrases
from service.records import Score, StateTap

BATCH_ITEMS = 64


def fit_drift(parts: MeasuredParts) -> DriftReference:
    """Return the means over the items of all parts but ``fit_states``."""
    taps = parts.reader.taps
    items = [item for part, measured in parts.clean.items() if part != "fit_states" for item in _observations(measured)]
    return drift_reference(items, taps)


def drift_reference(items: Sequence[Observation], taps: Sequence[StateTap]) -> DriftReference:
    """Return the means of items and their standard errors."""
    return reference_of(*measured_twice(items, taps), taps)


def measured_twice(
    items: Sequence[Observation], taps: Sequence[StateTap]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return what is compared of items, and the numbers of their prompts.

    The items pass twice, in batches, and the second pass is measured: phrases are then compared with those of as many
    prompts as in a running stream, and of ever other ones.
    """
    phrases = RecentPhrases()
    num_states = len(state_statistics(taps))
    batches = _batches(items)
    for batch in batches:
        compared_values(batch, phrases, num_states)
    measured = [compared_values(batch, phrases, num_states) for batch in batches]
    sizes = np.cumsum([0, *(prompts.max() + 1 for _, prompts in measured)])
    return (
        np.concatenate([values for values, _ in measured]),
        np.concatenate([prompts + start for (_, prompts), start in zip(measured, sizes, strict=False)]),
    )


def _batches(items: Sequence[Observation]) -> list[list[Observation]]:
    """Divide items into batches; completions of one prompt that follow each other stay together."""
    batches: list[list[Observation]] = []
    for _, same in groupby(items, lambda item: item.prompt):
        if not batches or len(batches[-1]) >= BATCH_ITEMS:
            batches.append([])
        batches[-1] += same
    return batches


def reference_of(values: NDArray[np.float64], prompts: NDArray[np.int64], taps: Sequence[StateTap]) -> DriftReference:
    """Return the means of values [items, statistics] and their standard errors, which account for prompts [items]."""
    statistics = DriftSubject.of(taps, None).statistics
    moments = BatchMoments.of(values, prompts)
    counts = np.maximum(moments.counts, 1.0)
    scarce = np.array([statistic.scarce for statistic in statistics])
    errors = np.sqrt(np.diag(moments.scatter) + scarce**2) / counts
    means = np.where(moments.counts > 0, moments.means, np.nan)
    return DriftReference(tuple(statistic.name for statistic in statistics), means, errors, len(values))


def _observations(items: MeasuredItems) -> list[Observation]:
    return [
        Observation(Score(float(reward), traits=tuple(row[NUM_TEXT:].tolist())), int(prompt), wording=text.wording)
        for reward, row, prompt, text in zip(
            items.scored.rewards, items.statistics, items.prompts, items.texts, strict=True
        )
    ]
