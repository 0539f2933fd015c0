"""Fits the drift monitor's reference: what it compares, on average over the calibration's items.

The items of the part ``fit_states`` are left out, because states and surprisal of the texts that their own means and
counts were fitted to look too typical.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.calibration.measured_parts import NUM_TEXT, MeasuredItems, MeasuredParts
from service.diagnostics.monitors.drift_monitor import DriftSubject, batch_moments, groups_of, state_statistics
from service.diagnostics.monitors.drift_reference import DriftReference
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.monitors.shared_phrases import NUM_PROMPTS
from service.records import Score, StateTap


def fit_drift(parts: MeasuredParts) -> DriftReference | None:
    """Return the means over the items of all parts but ``fit_states``; None where they have too few prompts."""
    groups = [
        group
        for part, measured in parts.clean.items()
        if part != "fit_states"
        for group in groups_of(_observations(measured))
    ]
    return drift_reference(groups, parts.reader.taps)


def drift_reference(groups: Sequence[Sequence[Observation]], taps: Sequence[StateTap]) -> DriftReference | None:
    """Return the means of items, in batches as they are compared, and their standard errors.

    Args:
        groups: completions of one prompt each; those of the last prompts that make no batch are left out.
        taps: taps of the states.

    Returns:
        The reference; None where there is not one batch.
    """
    statistics = DriftSubject.of(taps, None).statistics
    num_states = len(state_statistics(taps))
    starts = range(0, len(groups) - NUM_PROMPTS + 1, NUM_PROMPTS)
    batches = [batch_moments(groups[start : start + NUM_PROMPTS], num_states) for start in starts]
    if not batches:
        return None
    counts = np.sum([batch.counts for batch in batches], axis=0)
    means = np.sum([batch.counts * batch.means for batch in batches], axis=0) / np.maximum(counts, 1.0)
    scarce = np.array([statistic.scarce for statistic in statistics])
    scatter = sum(np.diag(batch.scatter) for batch in batches)
    errors = np.sqrt(scatter + scarce**2) / np.maximum(counts, 1.0)
    names = tuple(statistic.name for statistic in statistics)
    return DriftReference(names, np.where(counts > 0, means, np.nan), errors, int(counts.max()))


def _observations(items: MeasuredItems) -> list[Observation]:
    return [
        Observation(Score(float(reward), traits=tuple(row[NUM_TEXT:].tolist())), int(prompt), wording=text.wording)
        for reward, row, prompt, text in zip(
            items.scored.rewards, items.statistics, items.prompts, items.texts, strict=True
        )
    ]
