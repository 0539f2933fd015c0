"""Equal sequences of a batch are computed once: removal of duplicates, and scattering of results to all sequences.

Pure: the engines decide which of the remaining computations share a pass, and run them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from service.engines.base import EngineOutput
from service.records import TokenSequence

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Reading(NamedTuple):
    """The hidden states of a sequence: equal token ids with different prompts have different states to read."""

    token_ids: tuple[int, ...]
    """The row of the sequence."""

    mean_start: int
    """The first token that ``mean`` pooling includes, the first one of the completion."""

    @classmethod
    def of(cls, sequence: TokenSequence) -> Reading:
        """Return the reading of a sequence; where its prompt is unknown ``mean`` includes all tokens."""
        return cls(sequence.row, sequence.num_prompt_tokens or 0)


@dataclass(frozen=True, slots=True)
class UniquePass:
    """The content of one pass, without duplicates."""

    token_ids: Sequence[tuple[int, ...]]
    """The token ids of each sequence of the pass; all different."""

    readings: Sequence[Reading]
    """The readings whose states the pass returns, in order; empty where states are not requested."""

    steps: Sequence[tuple[int, ...]] = ()
    """The step positions that are read of each sequence; empty where none are."""


def unique_token_ids(sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
    """Return the different rows of a batch, in order of first appearance."""
    return list(dict.fromkeys(sequence.row for sequence in sequences))


def steps_by_row(sequences: Iterable[TokenSequence]) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Return the step positions of each row, ascending: all of those of the sequences with this row.

    Rows without steps are left out. So equal token ids with different steps are computed once.
    """
    positions: dict[tuple[int, ...], set[int]] = {}
    for sequence in sequences:
        if sequence.step_positions:
            positions.setdefault(sequence.row, set()).update(sequence.step_positions)
    return {row: tuple(sorted(found)) for row, found in positions.items()}


def unique_readings(sequences: Iterable[TokenSequence]) -> list[Reading]:
    """Return the different readings of a batch, in order of first appearance."""
    return list(dict.fromkeys(map(Reading.of, sequences)))


def scatter(
    sequences: Sequence[TokenSequence], outputs: Iterable[tuple[UniquePass, EngineOutput]], *, states: bool
) -> EngineOutput:
    """Return the output of a batch, assembled from the outputs of the passes over its different sequences.

    All tokens of a repeated sequence count as shared. Where several passes give the reward of the same token ids, the
    first one counts.

    Args:
        sequences: the batch, with repetitions.
        outputs: the output of every pass, in the order of the passes; consumed one by one.
        states: whether the passes read states.
    """
    first_index = {sequence.row: index for index, sequence in reversed(list(enumerate(sequences)))}
    rewards: dict[tuple[int, ...], float] = {}
    shared_tokens = [sequence.num_tokens for sequence in sequences]
    num_cached_tokens = 0
    found: dict[Reading, NDArray[np.float32]] = {}
    read: dict[tuple[int, ...], _RowOutputs] = {}
    for computed, output in outputs:
        num_cached_tokens += output.cached_tokens
        for token_ids, reward, num_shared in zip(computed.token_ids, output.rewards, output.shared_tokens, strict=True):
            rewards.setdefault(token_ids, reward)
            shared_tokens[first_index[token_ids]] = num_shared
        if output.outputs is not None:
            steps = computed.steps or [()] * len(output.outputs)
            for token_ids, positions, values in zip(computed.token_ids, steps, output.outputs, strict=True):
                read.setdefault(token_ids, _RowOutputs(positions, values))
        if output.states is not None:
            found.update(zip(computed.readings, output.states, strict=True))
    return EngineOutput(
        [rewards[sequence.row] for sequence in sequences],
        shared_tokens,
        np.stack([found[Reading.of(sequence)] for sequence in sequences]) if states else None,
        num_cached_tokens,
        [_outputs_of(sequence, rewards, read) for sequence in sequences] if read else None,
    )


class _RowOutputs(NamedTuple):
    """The head's outputs of one row."""

    steps: tuple[int, ...]
    """The step positions that were read, ascending."""

    values: NDArray[np.float32]
    """[steps + 1, outputs]."""


def _outputs_of(
    sequence: TokenSequence, rewards: dict[tuple[int, ...], float], read: dict[tuple[int, ...], _RowOutputs]
) -> NDArray[np.float32]:
    """Return the outputs at the sequence's own steps and its pooled token, of those that were read of its row."""
    found = read.get(sequence.row)
    if found is None:  # of a pass in which no sequence had steps, with a head of one output
        return np.array([[rewards[sequence.row]]], np.float32)
    index = {position: number for number, position in enumerate(found.steps)}
    return found.values[[*(index[position] for position in sequence.step_positions), len(found.steps)]]
