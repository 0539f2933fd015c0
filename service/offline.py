"""Scores token sequences without a server: batches within the engine's budget, results in the order of completion.

Batch jobs, calibrations, audits, exports and load tests score through it. The service's queue forms the batches and its
pipeline runs them, so the rewards are the served ones: a batch that does not fit the memory is halved, and a sequence
that cannot be scored fails alone. There are no deadlines and no threads here; the caller's thread runs the engine.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from reward_client.options import DiagnosticsLevel

from service.console import Advance
from service.diagnostics.item_state import Outcome
from service.errors import EngineUnavailable, HttpError
from service.pipeline import Pipeline, StartedBatch
from service.records import Encoding, Exchange, Item, TokenSequence
from service.scheduling.budget import BatchBudget
from service.scheduling.packed_batch import NumCachedTokens, nothing_cached
from service.scheduling.queue import Queue
from service.scheduling.work import prefix_key
from service.tokenization import Tokenization

logger = logging.getLogger(__name__)

MAX_BATCH_SEQUENCES = 512
"""Sequences of a batch unless the caller sets another limit; the default of the service's settings."""

ITEMS_PER_ENCODING = 256
"""Items that are tokenized in one call."""

_NO_GROUP = Item(Exchange("", ""))
"""A placeholder for the item of a sequence: the prefix key is then computed from the tokens alone."""

_Key: TypeAlias = tuple[tuple[int, ...], int | None, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """Sequences that share a forward pass."""

    sequences: tuple[TokenSequence, ...] = field(repr=False)
    """Distinct in their token ids and prompt lengths."""

    indices: tuple[tuple[int, ...], ...] = field(repr=False)
    """For each sequence the indices of the inputs that it answers, in order."""


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The outcomes of inputs that are complete."""

    results: tuple[tuple[int, Outcome], ...] = field(repr=False)
    """Index of the input, and its Score or error."""

    shared_tokens: int = 0
    """Tokens that the engine computed for another sequence of the batch or in an earlier pass."""


# --- Planning: pure --------------------------------------------------------------------------------------------------


class BatchPlanner:
    """Forms batches of the sequences of an iterable and reads only a limited number of them ahead.

    Equal sequences that wait at the same time are computed once. For a packed engine every prefix group is queued as a
    separate request, so that the queue can combine groups into full batches. For a padded engine all sequences that
    were read together are one request, sorted by length, so that a batch has similar lengths.

    Args:
        encoded: token sequences, and errors in the positions of items that could not be encoded; read once, in order.
        min_shared_prefix_tokens: common prefixes of at least this many tokens are computed once in a pass; None: not
            shared.
        look_ahead_tokens: the number of tokens to read ahead; more input is read when less than half of them wait. An
            error counts as one token. It should cover several batches, so that batches are full. None: read everything.
    """

    def __init__(
        self,
        encoded: Iterable[TokenSequence | HttpError],
        min_shared_prefix_tokens: int | None = None,
        look_ahead_tokens: int | None = None,
    ) -> None:
        if look_ahead_tokens is not None and look_ahead_tokens < 1:
            raise ValueError(f"look_ahead_tokens is {look_ahead_tokens}: at least 1, or None to read everything")
        self._source = enumerate(encoded)
        self._look_ahead_tokens = math.inf if look_ahead_tokens is None else look_ahead_tokens
        self._queue = Queue(0, min_shared_prefix_tokens)  # the limit of waiting tokens applies to admission only
        self._request_keys = itertools.count()
        self._indices: dict[_Key, list[int]] = {}
        self._refused: list[tuple[int, HttpError]] = []

    def take(
        self, budget: BatchBudget, num_cached_tokens: NumCachedTokens = nothing_cached
    ) -> tuple[PlannedBatch | None, list[tuple[int, HttpError]]]:
        """Return the next batch, None when all are taken, and the errors that were read since the last call.

        A batch may be None while there are errors and more to read: the input is exhausted when both are empty.
        """
        if self._queue.num_waiting_tokens < self._look_ahead_tokens / 2:
            self._read(budget)
        refused, self._refused = self._refused, []
        entries = self._queue.take_batch(0.0, budget, num_cached_tokens).entries
        if not entries:
            return None, refused
        sequences = tuple(entry.sequence for entry in entries)
        return PlannedBatch(sequences, tuple(tuple(self._indices.pop(_key(one))) for one in sequences)), refused

    def _read(self, budget: BatchBudget) -> None:
        new: list[TokenSequence] = []
        num_tokens = self._queue.num_waiting_tokens
        for index, entry in self._source:
            if isinstance(entry, HttpError):
                self._refused.append((index, entry))
                num_tokens += 1
            elif (known := self._indices.get(_key(entry))) is not None:
                known.append(index)
                num_tokens += 1
            else:
                self._indices[_key(entry)] = [index]
                new.append(entry)
                num_tokens += entry.num_tokens
            if num_tokens >= self._look_ahead_tokens:
                break
        for request in _requests(new, budget):
            prefixes = [prefix_key(_NO_GROUP, sequence) for sequence in request]
            self._queue.put(next(self._request_keys), request, prefixes, now=0.0, deadline=math.inf)


def plan_batches(
    sequences: Iterable[TokenSequence], budget: BatchBudget, min_shared_prefix_tokens: int | None = None
) -> Iterator[PlannedBatch]:
    """Yield batches within the budget that contain every sequence once, for callers that run their own forward pass."""
    planner = BatchPlanner(sequences, min_shared_prefix_tokens)
    while (batch := planner.take(budget)[0]) is not None:
        yield batch


def _requests(sequences: Iterable[TokenSequence], budget: BatchBudget) -> list[list[TokenSequence]]:
    if budget.cost == "padded":
        return [sorted(sequences, key=lambda sequence: sequence.num_tokens)]
    groups: dict[object, list[TokenSequence]] = {}
    for sequence in sequences:
        groups.setdefault(prefix_key(_NO_GROUP, sequence), []).append(sequence)
    # Sorted by token ids, sequences that share more than the prompt are adjacent, which the queue's cost accounts for.
    return [sorted(group, key=lambda sequence: sequence.token_ids) for group in groups.values()]


def _key(sequence: TokenSequence) -> _Key:
    """Sequences with equal keys have equal rewards and states: pooling may depend on where the completion begins."""
    return sequence.row, sequence.num_prompt_tokens, sequence.step_positions


# --- Scoring ---------------------------------------------------------------------------------------------------------


def encode_items(
    tokenization: Tokenization, items: Iterable[Item], encoding: Encoding
) -> Iterator[TokenSequence | HttpError]:
    """Yield the token sequence or the error of each item, in order; tokenizes `ITEMS_PER_ENCODING` items at a time."""
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, ITEMS_PER_ENCODING)):
        yield from tokenization.encode(chunk, encoding)


def score_offline(
    pipeline: Pipeline,
    encoded: Iterable[TokenSequence | HttpError],
    *,
    level: DiagnosticsLevel = "none",
    max_batch_sequences: int = MAX_BATCH_SEQUENCES,
    look_ahead_tokens: int | None = None,
    advance: Advance = lambda _: None,
) -> Iterator[tuple[int, Outcome]]:
    """Score any number of sequences and yield each result as soon as it is known.

    Memory is bounded by ``look_ahead_tokens``: inputs are read only as batches complete. When the caller stops early,
    passes that were already launched are completed, so the engine is usable afterwards.

    Args:
        pipeline: the pipeline of an engine that nothing else uses meanwhile.
        encoded: token sequences, each within the engine's ``max_input_tokens``, and errors of items that could not be
            encoded, which become their outcomes.
        level: the level of diagnostics, which decides whether hidden states are read; ``Diagnostician.complete``
            completes the Scores.
        max_batch_sequences: maximum of sequences in one pass.
        look_ahead_tokens: how much is read ahead; see `BatchPlanner`. None: everything, which forms the best batches.
        advance: called with the number of further inputs that are complete, before their results are yielded.

    Yields:
        The index of an input and its outcome, every index exactly once, in the order of completion.

    Raises:
        EngineUnavailable: the device is lost; nothing more can be scored.
    """
    batches = score_batches(
        pipeline,
        encoded,
        level=level,
        max_batch_sequences=max_batch_sequences,
        look_ahead_tokens=look_ahead_tokens,
        advance=advance,
    )
    with contextlib.closing(batches):
        for batch in batches:
            yield from batch.results


def score_batches(
    pipeline: Pipeline,
    encoded: Iterable[TokenSequence | HttpError],
    *,
    level: DiagnosticsLevel = "none",
    max_batch_sequences: int = MAX_BATCH_SEQUENCES,
    look_ahead_tokens: int | None = None,
    launch_ahead: bool = True,
    advance: Advance = lambda _: None,
) -> Generator[ScoredBatch, None, None]:
    """Yield the results of `score_offline` by batch, for a caller that measures batches.

    Args:
        pipeline: as for `score_offline`.
        encoded: as for `score_offline`.
        level: as for `score_offline`.
        max_batch_sequences: as for `score_offline`.
        look_ahead_tokens: as for `score_offline`.
        launch_ahead: whether the next pass is launched before the previous one is complete, if the engine supports it.
        advance: as for `score_offline`.
    """
    info = pipeline.engine.info
    budget = BatchBudget(info.cost, info.max_batch_tokens, max_batch_sequences)
    planner = BatchPlanner(encoded, info.min_shared_prefix_tokens, look_ahead_tokens)
    run = _Run(pipeline, planner, level, budget, pipeline.passes_ahead if launch_ahead else 0)
    try:
        while (batch := run.next_batch()) is not None:
            advance(len(batch.results))
            yield batch
    finally:  # also when the caller stops early or reading the input fails: launched passes must be awaited
        run.complete_all()


@dataclass(frozen=True, slots=True)
class _InFlightBatch:
    """A batch between start and completion, and the budget under which it was formed."""

    planned: PlannedBatch
    started: StartedBatch
    budget: BatchBudget


class _Run:
    """Starts batches, up to ``max_ahead`` of them before the oldest is complete, and completes them in order."""

    def __init__(
        self, pipeline: Pipeline, planner: BatchPlanner, level: DiagnosticsLevel, budget: BatchBudget, max_ahead: int
    ) -> None:
        self._pipeline = pipeline
        self._planner = planner
        self._level = level
        self._budget = budget
        self._max_ahead = max_ahead
        self._in_flight: deque[_InFlightBatch] = deque()

    def next_batch(self) -> ScoredBatch | None:
        """Return the next results; None when there are no more."""
        while True:
            if len(self._in_flight) > self._max_ahead:
                return self._complete_oldest()
            planned, refused = self._planner.take(self._budget, self._pipeline.engine.num_cached_tokens)
            if planned is not None:
                started = self._pipeline.start(planned.sequences, [self._level] * len(planned.sequences))
                self._in_flight.append(_InFlightBatch(planned, started, self._budget))
            if refused:
                return ScoredBatch(tuple(refused))
            if planned is None:
                return self._complete_oldest() if self._in_flight else None

    def complete_all(self) -> None:
        """Wait for all batches that were started and drop their results."""
        while self._in_flight:
            self._complete_oldest()

    def _complete_oldest(self) -> ScoredBatch:
        batch = self._in_flight.popleft()
        try:
            outcome = self._pipeline.finish(batch.started)
        except EngineUnavailable:
            self._in_flight.clear()  # the other passes were lost with the device
            raise
        # A batch that was formed under an earlier, larger budget is no reason to shrink it again.
        if outcome.out_of_memory and len(batch.planned.sequences) > 1 and batch.budget == self._budget:
            self._budget = self._budget.halved()
            logger.warning("Out of memory: a pass now holds at most %d tokens.", self._budget.max_tokens)
        results = tuple(
            (index, result)
            for indices, result in zip(batch.planned.indices, outcome.outcomes, strict=True)
            for index in indices
        )
        return ScoredBatch(results, sum(outcome.shared_tokens))
