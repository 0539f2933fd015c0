"""Scores items for a calibration as the service would: its tokenization, its batches, its engine.

For each item the reward, the token ids and one pooled state a tap are stored. A cache file makes repeated fits cheap;
its key contains everything that changes a score.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from reward_client.options import DiagnosticsLevel

from service.assembly import ServedModel
from service.console import Advance
from service.diagnostics.diagnosis import Diagnostician
from service.diagnostics.text import TextFacts, TextReader
from service.errors import CalibrationError, HttpError, NonFiniteReward
from service.offline import encode_items, score_offline
from service.pipeline import Pipeline
from service.records import Encoding, Exchange, Item, Message, Score, TokenSequence


@dataclass(frozen=True, slots=True)
class ScoredItems:
    """Items with their rewards and states, all in the same order."""

    exchanges: Sequence[Exchange] = field(repr=False)
    sequences: Sequence[TokenSequence] = field(repr=False)

    rewards: NDArray[np.float64] = field(repr=False)
    """float64 [items]."""

    states: NDArray[np.float32] = field(repr=False)
    """float32 [items, taps, hidden]."""

    def __len__(self) -> int:
        return len(self.exchanges)

    def read_texts(self, reader: TextReader) -> list[TextFacts]:
        """Compute all text statistics of the completions.

        Raises:
            CalibrationError: the tokenizer does not show where a completion begins.
        """
        items = [Item(exchange) for exchange in self.exchanges]
        found = reader.read_all(list(zip(items, self.sequences, strict=True)), full=True)
        if any(text is None for text in found):
            raise CalibrationError("The tokenizer does not show where a completion begins.")
        return [text for text in found if text is not None]


@dataclass(frozen=True, slots=True)
class ScoreWithStates(Score):
    """A Score that retains the states which it was computed from."""

    states: NDArray[np.float32] | None = field(default=None, repr=False, compare=False)
    """float32 [taps, hidden]."""


class StateRecorder(Diagnostician):
    """Reads the states of every sequence and retains them, in place of the statistics of a calibration."""

    def __init__(self) -> None:
        super().__init__(None)

    def needs_states(self, level: DiagnosticsLevel) -> bool:
        """Return True: states are what a calibration is fitted to."""
        del level
        return True

    def read_states(self, rewards: Sequence[float], states: NDArray[np.float32]) -> list[Score]:
        """Return a Score with its states, float32 [taps of the engine, hidden], for each reward."""
        return [ScoreWithStates(reward, states=own) for reward, own in zip(rewards, states, strict=True)]


def score_items(
    served: ServedModel, exchanges: Sequence[Exchange], advance: Advance, cache: Path | None = None
) -> tuple[ScoredItems, list[int]]:
    """Score items with their states; items that the service would refuse are left out.

    Args:
        served: assembled with taps; its scorer is not started.
        exchanges: to score.
        advance: called with the number of further items that are complete.
        cache: folder of earlier scores; what is found there is not computed again.

    Returns:
        The scored items, and their indices in ``exchanges``.

    Raises:
        CalibrationError: a reward is not finite, a forward pass fails, or the engine reads no states.
    """
    file = None if cache is None else cache / f"{_key(served, exchanges)}.pickle"
    if file is not None and file.exists():
        advance(len(exchanges))
        found, indices = pickle.loads(file.read_bytes())  # noqa: S301 - written by this command itself
        return found, indices
    scored, indices = _score(served, exchanges, advance)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps((scored, indices)))
    return scored, indices


def _score(served: ServedModel, exchanges: Sequence[Exchange], advance: Advance) -> tuple[ScoredItems, list[int]]:
    if not served.rule.has_reward:
        raise CalibrationError(
            f"The model has the outputs {', '.join(served.info.outputs)} and no weights of them, so there is no reward "
            "to calibrate: give --weights, as NAME=WEIGHT for each, and the same to reward-serve as "
            "model.reward_weights."
        )
    encoded = list(encode_items(served.tokenization, map(Item, exchanges), Encoding()))
    sequences = {index: entry for index, entry in enumerate(encoded) if isinstance(entry, TokenSequence)}
    if not sequences:
        raise CalibrationError("No item can be scored.")
    row_of = {index: row for row, index in enumerate(sequences)}
    rewards = np.empty(len(sequences))
    states: NDArray[np.float32] | None = None
    failures: list[HttpError] = []
    results = score_offline(
        Pipeline(served.scorer.pipeline.engine, StateRecorder(), rule=served.rule),
        encoded,
        max_batch_sequences=served.settings.batching.max_batch_sequences,
        advance=advance,
    )
    for index, outcome in results:
        if index not in row_of:
            continue
        if isinstance(outcome, HttpError):
            failures.append(outcome)
            continue
        own = _states_of(outcome, served)
        if states is None:
            states = np.empty((len(sequences), *own.shape), np.float32)
        rewards[row_of[index]], states[row_of[index]] = outcome.reward, own
    if states is None or failures:
        raise _failed(failures)
    chosen = [exchanges[index] for index in sequences]
    return ScoredItems(chosen, list(sequences.values()), rewards, states), list(sequences)


def _states_of(score: Score, served: ServedModel) -> NDArray[np.float32]:
    if not isinstance(score, ScoreWithStates) or score.states is None:
        raise CalibrationError(f"The {served.info.engine} engine reads no hidden states, so there is nothing to fit.")
    return score.states


def _failed(failures: Sequence[HttpError]) -> CalibrationError:
    if all(isinstance(failure, NonFiniteReward) for failure in failures):
        return CalibrationError(f"{len(failures)} rewards are not finite.")
    return CalibrationError(f"{len(failures)} items could not be scored; the first error: {failures[0]}")


def _key(served: ServedModel, exchanges: Sequence[Exchange]) -> str:
    facts = [served.identity.version, served.info.engine, served.info.forward, [str(tap) for tap in served.info.taps]]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for exchange in exchanges:
        for text in (exchange.prompt, exchange.completion):
            digest.update(_content_bytes(text) + b"\1")
        digest.update(exchange.tools.encode("utf-8", "surrogatepass") + b"\2")
    return digest.hexdigest()[:32]


def _content_bytes(text: str | tuple[Message, ...]) -> bytes:
    if isinstance(text, str):
        return repr(text).encode("utf-8", "surrogatepass")
    return repr([turn.as_dict() for turn in text]).encode("utf-8", "surrogatepass")
