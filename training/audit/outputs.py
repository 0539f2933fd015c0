"""Each output of a model with several, on the pairs of its own objective."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from training.audit.accuracy import wins_of
from training.audit.intervals import Interval, share_interval
from training.audit.length_bias import measure_length_bias
from training.audit.scored_pairs import ScoredPairs, distinct_completions

MIN_PAIRS_OF_OUTPUT = 2
"""Fewer pairs have no interval."""


@dataclass(frozen=True, slots=True)
class OutputFindings:
    """What is found about one output."""

    name: str
    num_pairs: int

    labelled: bool
    """Whether these are the pairs that are labelled with the output's name; otherwise they are all pairs."""

    accuracy: Interval
    """Share of the pairs in which the output is higher for the chosen completion."""

    longer_wins: Interval
    """Accuracy of preferring the longer completion on the same pairs."""

    length_within: Interval
    """Correlation of the output with ln(1 + length), about the means of the prompts."""


def measure_outputs(scored: ScoredPairs) -> list[OutputFindings]:
    """Return the findings on each output, in order; none for a model with one output."""
    objectives = np.array([pair.objective for pair in scored.pairs])
    found = []
    for name, rewards in scored.outputs.items():
        own = objectives == name
        labelled = int(own.sum()) >= MIN_PAIRS_OF_OUTPUT
        whole = replace(scored, chosen=rewards.chosen, rejected=rewards.rejected)
        part = whole.select(own) if labelled else whole
        found.append(
            OutputFindings(
                name=name,
                num_pairs=len(part),
                labelled=labelled,
                accuracy=share_interval(wins_of(part.gaps), part.prompts),
                longer_wins=share_interval(wins_of(part.length_gaps), part.prompts),
                length_within=measure_length_bias(distinct_completions(part)).within,
            )
        )
    return found
