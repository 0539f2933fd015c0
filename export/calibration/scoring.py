"""Scores items for a calibration as the service would: its tokenization, its queue's batches, its engine.

What is kept of an item is its reward, its token ids and one pooled state a tap. A cache file makes it cheap to fit
again; whatever changes a score changes the cache's key.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.assembly import ServedModel
from service.diagnostics.text import TextFacts, TextReader
from service.errors import CalibrationError, HttpError
from service.records import Encoding, Exchange, Item, TokenSequence
from service.scheduling.budget import BatchBudget
from service.scheduling.queue import Queue
from service.scheduling.work import plan_work

NO_DEADLINE = math.inf
NO_TEXT = Exchange("", "")
"""Stands for an item whose prefix is known from its tokens."""

ITEMS_PER_ENCODING = 256


@dataclass(frozen=True, slots=True)
class ScoredItems:
    """Items with what the model says of them, row by row.

    ``rewards``: float64 [items]. ``states``: float32 [items, taps, hidden].
    """

    exchanges: Sequence[Exchange] = field(repr=False)
    sequences: Sequence[TokenSequence] = field(repr=False)
    rewards: NDArray[np.float64] = field(repr=False)
    states: NDArray[np.float32] = field(repr=False)

    def __len__(self) -> int:
        return len(self.exchanges)

    def read_texts(self, reader: TextReader) -> list[TextFacts]:
        """Read the completions, all statistics included."""
        found = [
            reader.read(Item(exchange), sequence, full=True)
            for exchange, sequence in zip(self.exchanges, self.sequences, strict=True)
        ]
        if any(text is None for text in found):
            raise CalibrationError("The tokenizer does not show where a completion begins.")
        return [text for text in found if text is not None]


def score_items(
    served: ServedModel, exchanges: Sequence[Exchange], advance: Callable[[int], None], cache: Path | None = None
) -> tuple[ScoredItems, list[int]]:
    """Score items with their states; what the service would refuse is left out.

    Args:
        served: assembled with taps; its scorer is not started.
        exchanges: to score.
        advance: is told how many more items are done.
        cache: folder of earlier scores; what is found there is not computed again.

    Returns:
        The scored items, and the places that they had among the exchanges.

    Raises:
        CalibrationError: a reward is not finite, or the engine reads no states.
    """
    file = None if cache is None else cache / f"{_key(served, exchanges)}.pickle"
    if file is not None and file.exists():
        advance(len(exchanges))
        found, places = pickle.loads(file.read_bytes())  # noqa: S301 - written by us, in the user's own folder
        return found, places
    sequences, places = _encode(served, exchanges)
    advance(len(exchanges) - len(places))
    rewards, states = _forward(served, sequences, advance)
    scored = ScoredItems([exchanges[place] for place in places], sequences, rewards, states)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps((scored, places)))
    return scored, places


def _encode(served: ServedModel, exchanges: Sequence[Exchange]) -> tuple[list[TokenSequence], list[int]]:
    sequences, places = [], []
    for begin in range(0, len(exchanges), ITEMS_PER_ENCODING):
        items = [Item(exchange) for exchange in exchanges[begin : begin + ITEMS_PER_ENCODING]]
        for offset, sequence in enumerate(served.tokenization.encode(items, Encoding())):
            if not isinstance(sequence, HttpError):
                sequences.append(sequence)
                places.append(begin + offset)
    return sequences, places


def _forward(
    served: ServedModel, sequences: Sequence[TokenSequence], advance: Callable[[int], None]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    engine, info = served.scorer.pipeline.engine, served.info
    budget = BatchBudget(info.cost, info.max_batch_tokens, served.settings.batching.max_batch_sequences)
    work = plan_work([Item(NO_TEXT)] * len(sequences), sequences)
    num_tokens = sum(sequence.num_tokens for sequence in work.sequences)
    queue = Queue(num_tokens + 1, info.min_shared_prefix_tokens)
    queue.put("calibration", work.sequences, work.prefixes, now=0.0, deadline=NO_DEADLINE)
    rewards = np.full(len(sequences), np.nan)
    states: NDArray[np.float32] | None = None
    while taken := queue.take_batch(0.0, budget).entries:
        output = engine.forward([entry.sequence for entry in taken], states=True)
        if output.states is None:
            raise CalibrationError(f"The {info.engine} engine reads no hidden states, so there is nothing to fit.")
        if states is None:
            states = np.empty((len(sequences), *output.states.shape[1:]), np.float32)
        for entry, reward, state in zip(taken, output.rewards, output.states, strict=True):
            places = list(work.item_indices[entry.index])
            rewards[places], states[places] = reward, state
            advance(len(places))
    if states is None:
        raise CalibrationError("No item can be scored.")
    if not np.isfinite(rewards).all():
        raise CalibrationError(f"{int((~np.isfinite(rewards)).sum())} rewards are not finite.")
    return rewards, states


def _key(served: ServedModel, exchanges: Sequence[Exchange]) -> str:
    facts = [served.identity.version, served.info.engine, served.info.forward, [str(tap) for tap in served.info.taps]]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for exchange in exchanges:
        digest.update(
            repr(exchange.prompt).encode("utf-8", "surrogatepass") if isinstance(exchange.prompt, str) else b""
        )
        if not isinstance(exchange.prompt, str):
            for turn in exchange.prompt:
                digest.update(f"{turn.role}\0{turn.content}\0".encode("utf-8", "surrogatepass"))
        digest.update(b"\1" + exchange.completion.encode("utf-8", "surrogatepass") + b"\2")
    return digest.hexdigest()[:32]
