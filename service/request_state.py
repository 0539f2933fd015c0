"""The state of one accepted request, from tokenization to the answer.

It is changed on the event loop only; threads return what they compute of its items.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from reward_client.options import DiagnosticsLevel

from service.diagnostics.diagnosis import bare_score
from service.diagnostics.item_state import ItemState, Outcome, outcomes_of
from service.diagnostics.text import TextFacts
from service.errors import HttpError
from service.records import Score, ScoreRequest, Timings, TokenSequence, Usage
from service.scheduling.work import Work


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """The answer to a ScoreRequest."""

    outcomes: tuple[Outcome, ...]
    """A Score or an error for each item, in input order."""

    usage: Usage
    """``shared_tokens`` counts the tokens that were not computed for this request.

    They are those of repeated items, and those that the engine had computed already, for another item of this request
    or of another.
    """

    timings: Timings


class QueuedWork(Protocol):
    """Work in the queue and its results so far: of a request, or of a shard of one."""

    @property
    def work(self) -> Work:
        """What the engine computes."""
        ...

    @property
    def level(self) -> DiagnosticsLevel:
        """Decides whether hidden states are read."""
        ...

    def resolve(self, index: int, outcome: Outcome, shared_tokens: int) -> None:
        """Record the outcome of one sequence of the work."""
        ...

    def record_batch(self, begin: float, engine_s: float) -> None:
        """Record the times of a batch with sequences of the work."""
        ...

    def fail(self, error: HttpError) -> None:
        """End all of the work with an error, unless it has ended."""
        ...


class RequestState:
    """An accepted request and its results so far.

    Args:
        request: the parsed request.
        encoded: the token sequence or the error of each item, in order.
        work: what the engine computes for it.
        queued_at: when it was put into the queue, in seconds of the scorer's clock.
    """

    def __init__(
        self, request: ScoreRequest, encoded: Sequence[TokenSequence | HttpError], work: Work, queued_at: float
    ) -> None:
        self.request = request
        self.work = work
        self.level = request.diagnostics
        self.computed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when every item has its outcome from the engine, or with the error that ends the whole request."""
        self.items = [
            ItemState(item, entry, outcome=None if isinstance(entry, TokenSequence) else entry)
            for item, entry in zip(request.items, encoded, strict=True)
        ]
        self._queued_at = queued_at
        self._num_waiting = len(work.sequences)
        self._shared_tokens = 0
        self._queue_s = 0.0
        self._engine_s = 0.0
        if not self._num_waiting:
            self.computed.set_result(None)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """The outcome of each item, in order.

        Raises:
            InternalError: some item has none yet.
        """
        return outcomes_of(self.items)

    def resolve(self, index: int, outcome: Outcome, shared_tokens: int) -> None:
        """Record the outcome of one sequence, for all the items that it answers.

        Args:
            index: index of the sequence in ``work.sequences``; each is resolved once.
            outcome: from the engine.
            shared_tokens: tokens of the sequence that were not computed for it.
        """
        if isinstance(outcome, Score):
            self._shared_tokens += shared_tokens
        computed = self.work.sequences[index]
        for item_index in self.work.item_indices[index]:
            item = self.items[item_index]
            item.outcome = _outcome_for(item.encoded, computed, outcome)
        self._num_waiting -= 1
        if not self._num_waiting and not self.computed.done():
            self.computed.set_result(None)

    def record_texts(self, texts: Sequence[TextFacts | None]) -> None:
        """Record the text statistics of all items, in order."""
        for item, text in zip(self.items, texts, strict=True):
            item.text = text

    def complete(self, outcomes: Sequence[Outcome]) -> None:
        """Replace the outcome of each item, in order, by the one with diagnostics."""
        for item, outcome in zip(self.items, outcomes, strict=True):
            item.outcome = outcome

    def record_batch(self, begin: float, engine_s: float) -> None:
        """Record the times of a batch of this request; those of its last batch are the times of its slowest items."""
        self._queue_s, self._engine_s = begin - self._queued_at, engine_s

    def record_times(self, queue_s: float, engine_s: float) -> None:
        """Record the times of a shard; the request's are those of its slowest shard."""
        if queue_s + engine_s >= self._queue_s + self._engine_s:
            self._queue_s, self._engine_s = queue_s, engine_s

    def fail(self, error: HttpError) -> None:
        """End the whole request with an error, unless it has ended."""
        if not self.computed.done():
            self.computed.set_exception(error)

    def scored(self, tokenize_s: float, total_s: float, admission_s: float = 0.0) -> ScoredRequest:
        """Return the answer, once all outcomes are there."""
        timings = Timings(
            tokenize_s=tokenize_s,
            queue_s=self._queue_s,
            engine_s=self._engine_s,
            total_s=total_s,
            admission_s=admission_s,
        )
        return ScoredRequest(self.outcomes, self._usage(), timings)

    def _usage(self) -> Usage:
        sequences = [item.sequence for item in self.items if item.sequence is not None]
        scored = [
            item.encoded.num_tokens
            for item in self.items
            if isinstance(item.encoded, TokenSequence) and isinstance(item.outcome, Score)
        ]
        repeated = sum(
            (len(indices) - 1) * sequence.num_tokens
            for sequence, indices in zip(self.work.sequences, self.work.item_indices, strict=True)
            if isinstance(self.items[indices[0]].outcome, Score)
        )
        return Usage(
            prompt_tokens=sum((sequence.num_prompt_tokens or 0) + sequence.num_dropped for sequence in sequences),
            completion_tokens=sum(sequence.num_completion_tokens or 0 for sequence in sequences),
            scored_tokens=sum(scored),
            shared_tokens=repeated + self._shared_tokens,
        )


def _outcome_for(encoded: TokenSequence | HttpError, computed: TokenSequence, outcome: Outcome) -> Outcome:
    """Return the outcome of an item with the same token ids as the computed sequence.

    The ids are equal, but the prompt may end at another token: then only the reward is the item's too.
    """
    if isinstance(outcome, HttpError) or isinstance(encoded, HttpError):
        return outcome
    same_prompt = encoded.num_prompt_tokens == computed.num_prompt_tokens
    if same_prompt:
        return outcome
    return bare_score(outcome)
