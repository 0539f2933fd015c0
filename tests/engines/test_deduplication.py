"""Equal sequences of a batch are computed once, and every sequence gets its own results."""

from __future__ import annotations

import numpy as np

from service.engines.base import EngineOutput
from service.engines.deduplication import Reading, UniquePass, scatter, unique_readings, unique_token_ids
from service.records import TokenSequence

FIRST, SECOND = (5, 6, 7), (8, 9)
BATCH = [TokenSequence(FIRST, 1), TokenSequence(SECOND), TokenSequence(FIRST, 2), TokenSequence(FIRST, 1)]


def test_equal_sequences_are_removed() -> None:
    """Equal token ids remain once, in order of first appearance; with different prompts they have several readings."""
    assert unique_token_ids(BATCH) == [FIRST, SECOND]
    assert unique_readings(BATCH) == [Reading(FIRST, 1), Reading(SECOND, 0), Reading(FIRST, 2)]


def test_results_are_scattered_to_all_sequences() -> None:
    """Rewards and states follow the batch, over several passes; all tokens of a repeated sequence count as shared."""
    states = np.arange(3, dtype=np.float32).reshape(3, 1, 1)
    first = UniquePass([FIRST], [Reading(FIRST, 1), Reading(FIRST, 2)])
    second = UniquePass([SECOND], [Reading(SECOND, 0)])
    outputs = [(first, EngineOutput([0.5], [2], states[:2], 2)), (second, EngineOutput([-1.0], [0], states[2:]))]

    output = scatter(BATCH, outputs, states=True)

    assert output.rewards == [0.5, -1.0, 0.5, 0.5]
    assert output.shared_tokens == [2, 0, 3, 3]
    assert output.cached_tokens == 2
    assert output.states is not None
    assert output.states[:, 0, 0].tolist() == [0, 2, 1, 0]


def test_the_first_reward_of_equal_ids_counts() -> None:
    """A later pass over the same ids, run for its states, does not change the reward."""
    passes = [(UniquePass([FIRST], []), EngineOutput([reward], [0])) for reward in (0.25, 0.5)]

    assert scatter([TokenSequence(FIRST)], passes, states=False).rewards == [0.25]
