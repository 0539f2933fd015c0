"""The thread that owns the engine: takes batches from the queue, runs them, and hands the outcomes to the event loop.

What a batch holds is decided in ``scheduling``, what a reward means in ``pipeline``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from service.errors import DeadlineExceeded, EngineUnavailable, InternalError, WarmUpFailed
from service.pipeline import BatchOutcome, Pipeline, StartedBatch
from service.request_state import QueuedWork
from service.scheduling.budget import BatchBudget
from service.scheduling.flows import Entry
from service.scoring_metrics import ScoringMetrics
from service.warm_up import warm_up
from service.work_queue import TakenWork, WorkQueue

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _InFlightBatch:
    """A batch that was started and whose outcomes are not known yet."""

    entries: tuple[Entry, ...]

    states: tuple[QueuedWork, ...]
    """The request of each entry."""

    started: StartedBatch | None
    """None where ``Pipeline.start`` itself failed."""

    budget: BatchBudget
    """The budget under which the batch was taken."""

    begin: float
    """When it was started, in seconds of the clock."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [entry.num_tokens for entry in self.entries]


class EngineLoop:
    """Runs the engine in a thread of its own.

    Args:
        pipeline: the pipeline of an engine that nothing else uses.
        queue: the queue to take batches from; the owner closes it to end the loop.
        budget: the requested budget of a pass; the warm-up and out-of-memory errors reduce it.
        sample_token_ids: ordinary token ids, for the warm-up.
        metrics: the metrics of this replica.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        queue: WorkQueue,
        budget: BatchBudget,
        sample_token_ids: Sequence[int],
        metrics: ScoringMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._pipeline = pipeline
        self._queue = queue
        self._budget = budget
        self._sample_token_ids = sample_token_ids
        self._metrics = metrics
        self._clock = clock
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._on_death: Callable[[], None] = lambda: None
        # Like the budget these are written by the engine thread alone.
        self._busy_since: float | None = None
        self._busy_until = -math.inf
        self._total_busy_s = 0.0
        metrics.set_budget(budget)

    @property
    def budget(self) -> BatchBudget:
        """The current budget of a pass."""
        return self._budget

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def busy_s(self) -> float:
        """Seconds for which the oldest batch in flight has been running; 0 when the engine is idle."""
        busy_since = self._busy_since
        return 0.0 if busy_since is None else self._clock() - busy_since

    @property
    def total_busy_s(self) -> float:
        """Seconds for which batches have been running since the start."""
        return self._total_busy_s + self.busy_s

    async def start(self, on_death: Callable[[], None]) -> None:
        """Start the thread and return when the engine is warm; called once, on the event loop that gets the outcomes.

        Args:
            on_death: called on the event loop if the thread ends by an exception, before the waiting requests fail.

        Raises:
            WarmUpFailed: the largest legal batch does not run.
        """
        self._event_loop = asyncio.get_running_loop()
        self._started = self._event_loop.create_future()
        self._on_death = on_death
        self._thread.start()
        await self._started

    async def join(self, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` for the thread to end; a pass that hangs is abandoned."""
        if self.is_alive:
            await asyncio.to_thread(self._thread.join, timeout_s)

    # --- In the engine thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._warm_up()
            self._call_event_loop(self._finish_start, None)
            self._serve()
            self._pipeline.engine.close()
        except BaseException as error:  # for any error that ends this thread, the waiting requests must get an answer
            logger.critical("The engine thread has died.", exc_info=True)
            self._call_event_loop(self._die, error)

    def _warm_up(self) -> None:
        done = warm_up(self._pipeline.engine, self._budget, self._sample_token_ids)
        self._queue.record_throughput(done.num_tokens, done.seconds)
        self._set_budget(done.budget)

    def _serve(self) -> None:
        """Run batches until the queue is closed.

        Where the engine launches ahead, the next batch is started before the one in flight is waited for.
        """
        in_flight: deque[_InFlightBatch] = deque()
        while (taken := self._take(wait=not in_flight)) or in_flight:
            if taken:
                batch = self._dispatch(taken)
                in_flight += [batch] if batch else []
            if in_flight and (not taken or len(in_flight) > self._pipeline.passes_ahead):
                self._complete_oldest(in_flight)

    def _take(self, *, wait: bool) -> TakenWork | None:
        return self._queue.take(self._budget, self._pipeline.engine.num_cached_tokens, wait=wait)

    def _dispatch(self, taken: TakenWork) -> _InFlightBatch | None:
        """Start a batch; None where everything that was taken had expired."""
        if taken.expired:
            self._call_event_loop(_expire, taken.expired)
        entries = taken.batch.entries
        if not entries:
            return None
        begin = self._clock()
        self._busy_since = begin if self._busy_since is None else self._busy_since
        sequences = [entry.sequence for entry in entries]
        levels = [state.level for state in taken.computed]
        started = _guarded(len(entries), partial(self._pipeline.start, sequences, levels))
        return _InFlightBatch(entries, taken.computed, started, self._budget, begin)

    def _complete_oldest(self, in_flight: deque[_InFlightBatch]) -> None:
        """Wait for the oldest batch and hand its outcomes to the event loop."""
        batch = in_flight.popleft()
        outcome = _outcome_of(self._pipeline, batch)
        end = self._clock()
        busy_s = end - max(batch.begin, self._busy_until)
        self._busy_until = end
        self._total_busy_s += busy_s
        self._busy_since = end if in_flight else None
        lengths = batch.lengths
        self._queue.record_throughput(sum(lengths), busy_s)
        # A batch that was taken under an earlier, larger budget is no reason to shrink it again.
        if outcome.out_of_memory and len(lengths) > 1 and batch.budget == self._budget:
            self._set_budget(self._budget.halved())
        self._metrics.observe_batch(lengths, outcome, self._budget)
        self._call_event_loop(_resolve, batch, outcome, end - batch.begin)

    def _set_budget(self, budget: BatchBudget) -> None:
        if budget != self._budget:
            logger.warning("A pass now holds at most %d tokens.", budget.max_tokens)
        self._budget = budget
        self._metrics.set_budget(budget)

    def _call_event_loop(self, callback: Callable[..., None], *args: object) -> None:
        assert self._event_loop is not None  # noqa: S101 - the thread is started by start()
        with contextlib.suppress(RuntimeError):  # the loop is closed: no caller waits any more
            self._event_loop.call_soon_threadsafe(callback, *args)

    # --- On the event loop -------------------------------------------------------------------------------------------

    def _finish_start(self, error: WarmUpFailed | None) -> None:
        if self._started is None or self._started.done():
            return
        if error:
            self._started.set_exception(error)
        else:
            self._started.set_result(None)

    def _die(self, error: BaseException) -> None:
        self._on_death()
        failure = error if isinstance(error, WarmUpFailed) else WarmUpFailed(f"Warm-up ended: {type(error).__name__}.")
        self._finish_start(failure)
        self._queue.fail_all(engine_died)


def engine_died() -> EngineUnavailable:
    """Return the error of requests that a dead engine thread cannot answer."""
    return EngineUnavailable("The engine thread has died.")


def _outcome_of(pipeline: Pipeline, batch: _InFlightBatch) -> BatchOutcome:
    """Wait for a batch; where the pipeline itself fails, every sequence gets InternalError."""
    num_sequences = len(batch.entries)
    if batch.started is not None:
        outcome = _guarded(num_sequences, partial(pipeline.finish, batch.started))
        if outcome is not None:
            return outcome
    failures = tuple(InternalError("The batch failed.") for _ in range(num_sequences))
    return BatchOutcome(failures, 0, False, (0,) * num_sequences, 0.0, 0.0)


def _guarded(num_sequences: int, step: Callable[[], _Result]) -> _Result | None:
    """Return the result of a step of the pipeline; None where the pipeline itself failed, which is logged."""
    try:
        return step()
    except EngineUnavailable:
        raise
    except Exception:
        logger.exception("A batch of %d sequences failed outside the engine.", num_sequences)
        return None


def _resolve(batch: _InFlightBatch, outcome: BatchOutcome, engine_s: float) -> None:
    """Give each request of a batch its outcomes; on the event loop."""
    for state in dict.fromkeys(batch.states):
        state.record_batch(batch.begin, engine_s)
    outcomes = zip(batch.entries, batch.states, outcome.outcomes, outcome.shared_tokens, strict=True)
    for entry, state, its_outcome, shared_tokens in outcomes:
        state.resolve(entry.index, its_outcome, shared_tokens)


def _expire(states: Sequence[QueuedWork]) -> None:
    for state in states:
        state.fail(DeadlineExceeded("The deadline passed in the queue."))
