"""The asyncio side of scoring: admit, tokenize, queue, and answer every accepted item exactly once.

The event loop admits, queues and resolves; threads tokenize; one thread of its own owns the engine. What a batch holds
is decided in ``batching``, what a reward means in ``pipeline``; here is only who waits for whom.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, TypeAlias, TypeVar

from reward_client.options import DiagnosticsLevel

from service.diagnostics.diagnosis import Outcome
from service.diagnostics.monitors.monitor import Monitors
from service.diagnostics.text import TextFacts
from service.errors import (
    DeadlineExceeded,
    Draining,
    EngineUnavailable,
    HttpError,
    InternalError,
    NonFiniteReward,
    NotReady,
    RequestRefused,
    WarmUpFailed,
)
from service.metrics import Metrics
from service.pipeline import BatchOutcome, Pipeline, StartedBatch
from service.records import Encoding, Item, Score, ScoreRequest, Timings, TokenSequence, Usage
from service.scheduling.queue import BatchBudget, Entry, Queue, TakenBatch, batch_cost
from service.settings import BatchingSettings, LimitSettings

logger = logging.getLogger(__name__)

State: TypeAlias = Literal["starting", "ready", "draining", "failed"]
_Made = TypeVar("_Made")
_TextReading: TypeAlias = "asyncio.Future[list[TextFacts | None]]"

CHUNK_CHARS = 65_536
"""Characters tokenized in one go: a large request gives way to small ones after each chunk."""

MIN_ITEM_CHARS = 1024
"""What an item counts for in a chunk at least; 64 items are a full one, however short they are."""

FEW_ITEMS = CHUNK_CHARS // MIN_ITEM_CHARS
"""Items of a request up to which the event loop does small work itself: a thread would take longer to hear of it."""

FEW_CHARS = 4096
"""Characters of a request up to which the event loop tokenizes and reads it too; a millisecond, without the GIL."""

HEAD_TOKENS = 64
"""Leading tokens by which sequences are kept beside their likes where the end of the prompt is unknown."""

ENGINE_STOP_S = 5.0
"""How long `Scorer.stop` waits for the pass that is running; the process may end without it."""


class Encoder(Protocol):
    """What the scorer needs of tokenization; safe to call from several threads."""

    @property
    def sample_token_ids(self) -> Sequence[int]:
        """Ordinary token ids, of which warm-up batches are made."""
        ...

    def encode(self, items: Sequence[Item], encoding: Encoding) -> Sequence[TokenSequence | HttpError]:
        """Return a Sequence or an error for each item, in order."""
        ...

    def estimate_tokens(self, items: Sequence[Item]) -> int:
        """Guess the tokens of the items without tokenizing."""
        ...


@dataclass(frozen=True, slots=True)
class ScoredRequest:
    """The answer to a ScoreRequest: a Score or an error for each item, in input order, and what that took.

    ``usage.shared_tokens`` counts the tokens that were not computed for it: those of repeated items, and those that the
    engine had computed already, for another item of this request or of another.
    """

    outcomes: tuple[Outcome, ...]
    usage: Usage
    timings: Timings


@dataclass(frozen=True, slots=True)
class Work:
    """What a request asks of the engine: each distinct token sequence once.

    ``prefixes``: for each sequence, the key of what it may share. ``places``: for each, the items that it answers.
    """

    sequences: tuple[TokenSequence, ...]
    prefixes: tuple[Hashable, ...]
    places: tuple[tuple[int, ...], ...]


def chunks_of(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Cut the items, in order, into lists of about `CHUNK_CHARS` characters; a longer item stands alone or last."""
    chunk: list[Item] = []
    num_chars = 0
    for item in items:
        chunk.append(item)
        num_chars += max(item.content.num_chars, MIN_ITEM_CHARS)
        if num_chars >= CHUNK_CHARS:
            yield chunk
            chunk, num_chars = [], 0
    if chunk:
        yield chunk


def plan_work(items: Sequence[Item], encoded: Sequence[TokenSequence | HttpError]) -> Work:
    """Leave out errors and repeated token sequences, and put what shares a beginning side by side.

    Equal token ids are computed once, so the same text is bit-identical within a request, whatever the batches are.
    """
    first: dict[tuple[int, ...], TokenSequence] = {}
    places: dict[tuple[int, ...], list[int]] = {}
    for place, sequence in enumerate(encoded):
        if isinstance(sequence, TokenSequence):
            first.setdefault(sequence.token_ids, sequence)
            places.setdefault(sequence.token_ids, []).append(place)
    distinct = sorted(first)
    return Work(
        sequences=tuple(first[ids] for ids in distinct),
        prefixes=tuple(prefix_key(items[places[ids][0]], first[ids]) for ids in distinct),
        places=tuple(tuple(places[ids]) for ids in distinct),
    )


def prefix_key(item: Item, sequence: TokenSequence) -> Hashable:
    """Return a key that is equal for sequences of one prompt, in this request and in others.

    It is a hash, which may collide: it only decides who travels together. What is shared is decided on token ids.
    """
    if sequence.num_prompt_tokens is not None:
        return hash(sequence.token_ids[: sequence.num_prompt_tokens])
    if item.group is not None:
        return item.group, hash(sequence.token_ids[:HEAD_TOKENS])
    return hash(sequence.token_ids[:HEAD_TOKENS])


class _Pending:
    """A request on its way: what was asked, what is known so far, and the future that its caller awaits.

    Settled on the event loop only.
    """

    def __init__(
        self, level: DiagnosticsLevel, encoded: Sequence[TokenSequence | HttpError], work: Work, queued_at: float
    ) -> None:
        self.level = level
        self.encoded = encoded
        self.work = work
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queued_at = queued_at
        self._outcomes: list[Outcome | None] = [
            None if isinstance(entry, TokenSequence) else entry for entry in encoded
        ]
        self._num_waiting = len(work.sequences)
        self._shared_tokens = 0
        self._queue_s = 0.0
        self._engine_s = 0.0
        if not self._num_waiting:
            self.answered.set_result(None)

    def settle(self, entry: Entry, outcome: Outcome, shared_tokens: int) -> None:
        """Take in the outcome of one sequence, for all the items that it answers; the last one answers the request."""
        if isinstance(outcome, Score):
            self._shared_tokens += shared_tokens
        for place in self.work.places[entry.place]:
            self._outcomes[place] = self._outcome_of_twin(place, entry, outcome)
        self._num_waiting -= 1
        if not self._num_waiting and not self.answered.done():
            self.answered.set_result(None)

    def note_batch(self, begin: float, engine_s: float) -> None:
        """Remember the batch that was answered last: its items are the slowest of the request."""
        self._queue_s, self._engine_s = begin - self._queued_at, engine_s

    def fail(self, error: HttpError) -> None:
        """Answer the request as a whole with an error, unless it has its answer."""
        if not self.answered.done():
            self.answered.set_exception(error)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """What the engine made of the items, in order, once every item has its outcome."""
        outcomes = tuple(outcome for outcome in self._outcomes if outcome is not None)
        if len(outcomes) != len(self.encoded):
            raise InternalError(f"{len(self.encoded) - len(outcomes)} items have no outcome.")
        return outcomes

    def scored(self, outcomes: tuple[Outcome, ...], tokenize_s: float, total_s: float) -> ScoredRequest:
        """Return the answer with these outcomes."""
        timings = Timings(tokenize_s=tokenize_s, queue_s=self._queue_s, engine_s=self._engine_s, total_s=total_s)
        return ScoredRequest(outcomes, self._usage(outcomes), timings)

    def _outcome_of_twin(self, place: int, entry: Entry, outcome: Outcome) -> Outcome:
        """Give an item the reward of its equal: the ids are the same, but where its completion begins may differ."""
        twin = self.encoded[place]
        if isinstance(outcome, HttpError) or isinstance(twin, HttpError):
            return outcome
        same_border = twin.num_prompt_tokens == entry.sequence.num_prompt_tokens
        return outcome if same_border else Score(outcome.reward)

    def _usage(self, outcomes: Sequence[Outcome]) -> Usage:
        sequences = [sequence for sequence in self.encoded if isinstance(sequence, TokenSequence)]
        scored = [
            sequence.num_tokens
            for sequence, outcome in zip(self.encoded, outcomes, strict=True)
            if isinstance(sequence, TokenSequence) and isinstance(outcome, Score)
        ]
        repeated = sum(
            (len(places) - 1) * sequence.num_tokens
            for sequence, places in zip(self.work.sequences, self.work.places, strict=True)
            if isinstance(outcomes[places[0]], Score)
        )
        return Usage(
            prompt_tokens=sum((sequence.num_prompt_tokens or 0) + sequence.num_dropped for sequence in sequences),
            completion_tokens=sum(sequence.num_completion_tokens or 0 for sequence in sequences),
            scored_tokens=sum(scored),
            shared_tokens=repeated + self._shared_tokens,
        )


@dataclass(frozen=True, slots=True)
class _InFlightBatch:
    """A batch that was started and not yet answered. ``started`` is None where the start itself failed.

    ``budget``: under which it was taken. ``begin``: when, in seconds of the clock.
    """

    entries: tuple[Entry, ...]
    owners: Sequence[_Pending]
    started: StartedBatch | None
    budget: BatchBudget
    begin: float


def _failed_outcome(num_sequences: int) -> BatchOutcome:
    failures = tuple(InternalError("The batch failed.") for _ in range(num_sequences))
    return BatchOutcome(failures, 0, False, (0,) * num_sequences, 0.0, 0.0)


class Scorer:
    """Scores requests on one engine, many at a time.

    Args:
        encoder: turns items into sequences.
        pipeline: on an engine that nobody else uses.
        limits: on requests and on what may wait.
        batching: the budget of a pass.
        metrics: of this replica.
        monitors: that watch what is answered; None: nobody does.
        num_tokenizer_threads: beside the event loop.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        encoder: Encoder,
        pipeline: Pipeline,
        limits: LimitSettings,
        batching: BatchingSettings,
        metrics: Metrics,
        *,
        monitors: Monitors | None = None,
        num_tokenizer_threads: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        info = pipeline.engine.info
        self._encoder = encoder
        self._pipeline = pipeline
        self._limits = limits
        self._metrics = metrics
        self._monitors = monitors
        self._clock = clock
        self._budget = BatchBudget(
            info.cost,
            batching.max_batch_tokens or info.max_batch_tokens,
            batching.max_batch_sequences,
        )
        self._state: State = "starting"
        self._threads = ThreadPoolExecutor(num_tokenizer_threads, thread_name_prefix="tokenize")
        self._engine_thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        self._keys = itertools.count()
        self._num_accepted = 0
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        # As the budget, written by the engine thread alone.
        self._busy_since: float | None = None
        self._busy_until = -math.inf
        # Shared with the engine thread, and changed under the condition's lock only.
        self._work_waits = threading.Condition()
        self._queue = Queue(
            limits.max_queue_tokens, info.min_shared_prefix_tokens, batch_tokens=self._budget.max_tokens
        )
        self._pending: dict[Hashable, _Pending] = {}
        self._stopped = False
        self._publish_gauges()

    # --- Life --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """``ready`` takes requests; ``draining`` answers those it has taken; ``failed`` must be replaced."""
        return self._state

    @property
    def pipeline(self) -> Pipeline:
        """What batches run through; for jobs that bring batches of their own, while the scorer is not started."""
        return self._pipeline

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the engine, those of requests still being tokenized estimated."""
        return self._queue.num_waiting_tokens

    @property
    def budget(self) -> BatchBudget:
        """What a pass may hold now; it shrinks when the device runs out of memory."""
        return self._budget

    @property
    def is_engine_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._engine_thread.is_alive()

    async def start(self) -> None:
        """Start the engine thread and warm the engine up; return when requests are taken.

        Raises:
            WarmUpFailed: the largest legal batch does not run.
        """
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._engine_thread.start()
        await self._started
        if self._state == "starting":
            self._enter("ready")

    async def stop(self, drain_s: float) -> None:
        """Take no more requests, answer the accepted ones for up to ``drain_s``, then end the engine thread.

        Requests that are not answered by then get Draining. May be called again; a pass that hangs is left behind.
        """
        if self._state != "failed":
            self._enter("draining")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._all_answered.wait()
        with self._work_waits:
            self._stopped = True
            self._work_waits.notify()
        self._fail_all(lambda: Draining("The replica shut down before this request's turn came."))
        if self.is_engine_alive:
            await asyncio.to_thread(self._engine_thread.join, ENGINE_STOP_S)
        self._threads.shutdown(wait=False)

    def check_health(self) -> None:
        """Say nothing while the engine is well.

        Raises:
            EngineUnavailable: its thread has died, or one batch has run for longer than any caller may wait.
        """
        if self._state == "failed":
            raise EngineUnavailable("The engine thread has died.")
        busy_since = self._busy_since
        if busy_since is not None and self._clock() - busy_since > self._limits.deadline_s:
            raise EngineUnavailable(f"A batch has been running for more than {self._limits.deadline_s:g} s.")

    def _enter(self, state: State) -> None:
        self._state = state
        self._metrics.ready.set(state == "ready")

    # --- The road of a request ---------------------------------------------------------------------------------------

    async def score(self, request: ScoreRequest) -> ScoredRequest:
        """Score a request; exactly one answer comes, here or as an exception.

        Raises:
            Overloaded, NotReady, Draining, EngineUnavailable: it was refused before any work.
            DeadlineExceeded: its time is over; what was still waiting is not computed.
            EngineUnavailable, Draining: the replica ended before it was answered.
            CancelledError: the caller left; what was still waiting is not computed.
        """
        num_items = len(request.items)
        arrived = self._clock()
        timeout_s = min(request.timeout_s, self._limits.deadline_s)
        key = self._admit(request)
        self._accept(num_items)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._score_accepted(key, request, arrived, arrived + timeout_s)
        except (TimeoutError, DeadlineExceeded):
            self._count(num_items, "expired")
            raise DeadlineExceeded(f"No answer within {timeout_s:g} s.") from None
        except asyncio.CancelledError:
            self._count(num_items, "cancelled")
            raise
        except BaseException:
            self._count(num_items, "error")
            raise
        finally:
            self._release(key, num_items)

    def _admit(self, request: ScoreRequest) -> Hashable:
        """Refuse before anything was done, or reserve room in the line and return the key of the reservation."""
        key = next(self._keys)
        try:
            self._refuse_unless_ready()
            num_tokens = self._encoder.estimate_tokens(request.items)
            with self._work_waits:
                self._queue.admit(key, num_tokens)
        except HttpError as refusal:
            self._metrics.shed.labels(reason=refusal.code).inc()
            self._count(len(request.items), "shed")
            raise
        return key

    def _refuse_unless_ready(self) -> None:
        if self._state == "starting":
            raise NotReady("The model is loading or warming up.")
        if self._state == "draining":
            raise Draining("This replica takes no new requests.")
        if self._state == "failed":
            raise EngineUnavailable("The engine thread has died.")

    def _accept(self, num_items: int) -> None:
        self._num_accepted += 1
        self._all_answered.clear()
        self._metrics.inflight_items.inc(num_items)

    def _release(self, key: Hashable, num_items: int) -> None:
        with self._work_waits:
            self._queue.cancel(key)
            self._pending.pop(key, None)
        self._metrics.inflight_items.dec(num_items)
        self._num_accepted -= 1
        if not self._num_accepted:
            self._all_answered.set()

    async def _score_accepted(
        self, key: Hashable, request: ScoreRequest, arrived: float, deadline: float
    ) -> ScoredRequest:
        begin = self._clock()
        encoded, work = await self._encode(request)
        queued = self._clock()
        pending = _Pending(request.diagnostics, encoded, work, queued)
        self._enqueue(key, pending, queued, deadline)
        texts = self._read_texts(request, encoded)
        await pending.answered
        outcomes = await self._complete(request, encoded, pending.outcomes, texts)
        scored = pending.scored(outcomes, tokenize_s=queued - begin, total_s=self._clock() - arrived)
        self._observe(scored, encoded)
        if self._monitors is not None:
            self._monitors.observe_request(request, encoded, scored.outcomes)
        return scored

    def _read_texts(self, request: ScoreRequest, encoded: Sequence[TokenSequence | HttpError]) -> list[_TextReading]:
        """Start to read the texts in the tokenizer's threads; the forward pass runs meanwhile."""
        if request.diagnostics == "none" or self._stopped:
            return []
        read = self._pipeline.diagnostician.read_texts
        readings, begin = [], 0
        for chunk in chunks_of(request.items):
            end = begin + len(chunk)
            readings.append(self._start(chunk, read, chunk, encoded[begin:end], request.diagnostics))
            begin = end
        return readings

    async def _complete(
        self,
        request: ScoreRequest,
        encoded: Sequence[TokenSequence | HttpError],
        outcomes: tuple[Outcome, ...],
        readings: Sequence[_TextReading],
    ) -> tuple[Outcome, ...]:
        texts = [text for reading in readings for text in await reading] or [None] * len(outcomes)
        complete = partial(
            self._pipeline.diagnostician.complete, request.items, encoded, outcomes, texts, request.diagnostics
        )
        if len(outcomes) <= FEW_ITEMS or self._stopped:
            return tuple(complete())
        return tuple(await asyncio.get_running_loop().run_in_executor(self._threads, complete))

    async def _encode(self, request: ScoreRequest) -> tuple[list[TokenSequence | HttpError], Work]:
        loop = asyncio.get_running_loop()
        encoded: list[TokenSequence | HttpError] = []
        for chunk in chunks_of(request.items):
            self._refuse_if_stopped()
            encoded += await self._start(chunk, self._encoder.encode, chunk, request.encoding)
        if len(encoded) <= FEW_ITEMS:
            return encoded, plan_work(request.items, encoded)
        self._refuse_if_stopped()
        return encoded, await loop.run_in_executor(self._threads, plan_work, request.items, encoded)

    def _start(self, chunk: Sequence[Item], work: Callable[..., _Made], *args: object) -> asyncio.Future[_Made]:
        """Start work on a chunk in a tokenizer thread, or have it done at once where the thread would take longer."""
        loop = asyncio.get_running_loop()
        if len(chunk) <= FEW_ITEMS and sum(item.content.num_chars for item in chunk) <= FEW_CHARS:
            done: asyncio.Future[_Made] = loop.create_future()
            done.set_result(work(*args))
            return done
        return loop.run_in_executor(self._threads, partial(work, *args))

    def _enqueue(self, key: Hashable, pending: _Pending, now: float, deadline: float) -> None:
        with self._work_waits:
            self._refuse_if_stopped()
            self._pending[key] = pending
            self._queue.put(key, pending.work.sequences, pending.work.prefixes, now=now, deadline=deadline)
            self._work_waits.notify()

    def _refuse_if_stopped(self) -> None:
        """Nobody would serve what is queued now; checked again where a request resumes after an await."""
        if self._state == "failed":
            raise EngineUnavailable("The engine thread has died.")
        if self._stopped:
            raise Draining("The replica shut down before this request's turn came.")

    # --- The engine thread -------------------------------------------------------------------------------------------

    def _run_engine(self) -> None:
        try:
            self._warm_up()
            self._call_loop(self._finish_start, None)
            self._serve()
            self._pipeline.engine.close()
        except BaseException as error:  # whatever ends this thread, those who wait on it must hear of it
            logger.critical("The engine thread has died.", exc_info=True)
            self._call_loop(self._on_engine_death, error)

    def _serve(self) -> None:
        """Take batches while there are any; where the engine launches ahead, the next before the last is waited for."""
        in_flight: deque[_InFlightBatch] = deque()
        while (taken := self._next_batch(wait=not in_flight)) or in_flight:
            if taken:
                batch = self._dispatch(*taken)
                in_flight += [batch] if batch else []
            if in_flight and (not taken or len(in_flight) > self._pipeline.passes_ahead):
                self._complete_oldest(in_flight)

    def _warm_up(self) -> None:
        warm_up = self._pipeline.warm_up(self._budget, self._encoder.sample_token_ids)
        with self._work_waits:
            self._queue.record_throughput(warm_up.num_tokens, warm_up.seconds)
        self._set_budget(warm_up.budget)

    def _next_batch(self, *, wait: bool) -> tuple[TakenBatch, list[_Pending]] | None:
        """Take work, with whom each entry belongs to (first those to compute, then the expired).

        None: there is none; with ``wait``, there never will be.
        """
        with self._work_waits:
            while not self._stopped:
                taken = self._queue.take_batch(self._clock(), self._budget, self._pipeline.engine.num_cached_tokens)
                if taken.entries or taken.expired:
                    return taken, [self._pending[entry.request] for entry in (*taken.entries, *taken.expired)]
                if not wait:
                    return None
                self._work_waits.wait()
        return None

    def _dispatch(self, taken: TakenBatch, owners: Sequence[_Pending]) -> _InFlightBatch | None:
        """Start a batch; None where all that was taken had expired."""
        num_computed = len(taken.entries)
        if taken.expired:
            self._call_loop(self._expire, owners[num_computed:])
        if not taken.entries:
            return None
        begin = self._clock()
        self._busy_since = begin if self._busy_since is None else self._busy_since
        sequences = [entry.sequence for entry in taken.entries]
        levels = [owner.level for owner in owners[:num_computed]]
        started = self._guarded(num_computed, partial(self._pipeline.start, sequences, levels))
        return _InFlightBatch(taken.entries, owners[:num_computed], started, self._budget, begin)

    def _complete_oldest(self, in_flight: deque[_InFlightBatch]) -> None:
        """Wait for the oldest batch and hand its outcome to the event loop."""
        batch = in_flight.popleft()
        num_sequences = len(batch.entries)
        outcome: BatchOutcome | None = None
        if batch.started is not None:
            outcome = self._guarded(num_sequences, partial(self._pipeline.finish, batch.started))
        if outcome is None:
            outcome = _failed_outcome(num_sequences)
        end = self._clock()
        busy_s = end - max(batch.begin, self._busy_until)
        self._busy_until = end
        self._busy_since = end if in_flight else None
        lengths = [entry.num_tokens for entry in batch.entries]
        with self._work_waits:
            self._queue.record_throughput(sum(lengths), busy_s)
        # A batch that was taken before the budget shrank says nothing about the new one.
        if outcome.out_of_memory and num_sequences > 1 and batch.budget == self._budget:
            self._set_budget(self._budget.halved())
        self._observe_batch(lengths, outcome)
        self._call_loop(self._resolve, batch.entries, batch.owners, outcome, batch.begin, end - batch.begin)

    def _guarded(self, num_sequences: int, step: Callable[[], _Made]) -> _Made | None:
        """Return what a step of the pipeline returns; None where it failed outside of what it guards itself."""
        try:
            return step()
        except EngineUnavailable:
            raise
        except Exception:
            logger.exception("A batch of %d sequences failed outside the engine.", num_sequences)
            return None

    def _call_loop(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None  # noqa: S101 - the thread is started by start()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(callback, *args)

    def _set_budget(self, budget: BatchBudget) -> None:
        if budget != self._budget:
            logger.warning("A pass now holds at most %d tokens.", budget.max_tokens)
        self._budget = budget
        self._metrics.budget_tokens.set(budget.max_tokens)

    # --- Back on the event loop --------------------------------------------------------------------------------------

    def _finish_start(self, error: WarmUpFailed | None) -> None:
        if self._started is None or self._started.done():
            return
        if error:
            self._started.set_exception(error)
        else:
            self._started.set_result(None)

    def _resolve(
        self, entries: Sequence[Entry], owners: Sequence[_Pending], outcome: BatchOutcome, begin: float, engine_s: float
    ) -> None:
        for owner in dict.fromkeys(owners):
            owner.note_batch(begin, engine_s)
        for entry, owner, its_outcome, shared in zip(
            entries, owners, outcome.outcomes, outcome.shared_tokens, strict=True
        ):
            owner.settle(entry, its_outcome, shared)

    def _expire(self, owners: Sequence[_Pending]) -> None:
        for owner in owners:
            owner.fail(DeadlineExceeded("The deadline passed in the queue."))

    def _on_engine_death(self, error: BaseException) -> None:
        self._enter("failed")
        failure = error if isinstance(error, WarmUpFailed) else WarmUpFailed(f"Warm-up ended: {type(error).__name__}.")
        self._finish_start(failure)
        self._fail_all(lambda: EngineUnavailable("The engine thread has died."))

    def _fail_all(self, error: Callable[[], HttpError]) -> None:
        for pending in list(self._pending.values()):
            pending.fail(error())

    # --- What is counted ---------------------------------------------------------------------------------------------

    def _publish_gauges(self) -> None:
        self._metrics.budget_tokens.set(self._budget.max_tokens)
        self._metrics.queue_items.set_function(lambda: len(self._queue))
        self._metrics.queue_tokens.set_function(lambda: self.queued_tokens)
        self._metrics.queue_oldest.set_function(self._oldest_wait_s)

    def _oldest_wait_s(self) -> float:
        with self._work_waits:
            oldest = self._queue.oldest_arrival
        return 0.0 if oldest is None else self._clock() - oldest

    def _count(self, num_items: int, outcome: str) -> None:
        self._metrics.items.labels(outcome=outcome).inc(num_items)

    def _observe(self, scored: ScoredRequest, encoded: Sequence[TokenSequence | HttpError]) -> None:
        metrics = self._metrics
        metrics.stage_duration.labels(stage="tokenize").observe(scored.timings.tokenize_s)
        metrics.stage_duration.labels(stage="queue").observe(scored.timings.queue_s)
        labels = Counter(map(outcome_label, scored.outcomes, encoded))
        for label, num_items in labels.items():
            self._count(num_items, label)
        for outcome, sequence in zip(scored.outcomes, encoded, strict=True):
            if isinstance(outcome, Score) and isinstance(sequence, TokenSequence):
                metrics.reward.observe(outcome.reward)
                if sequence.num_completion_tokens is not None:
                    metrics.completion_length.observe(sequence.num_completion_tokens)

    def _observe_batch(self, lengths: Sequence[int], outcome: BatchOutcome) -> None:
        metrics = self._metrics
        real = sum(lengths)
        metrics.batch_items.observe(len(lengths))
        metrics.batch_tokens.observe(real)
        metrics.forwards.inc(outcome.num_forwards)
        metrics.oom.inc(outcome.out_of_memory)
        metrics.tokens.labels(kind="real").inc(real)
        metrics.tokens.labels(kind="padding").inc(batch_cost(lengths, self._budget.cost) - real)
        metrics.tokens.labels(kind="shared").inc(sum(outcome.shared_tokens))
        metrics.tokens.labels(kind="cached").inc(outcome.cached_tokens)
        metrics.stage_duration.labels(stage="forward").observe(outcome.forward_s)
        metrics.stage_duration.labels(stage="diagnose").observe(outcome.diagnose_s)


def outcome_label(outcome: Outcome, sequence: TokenSequence | HttpError) -> str:
    """Name an item's outcome as ``rm_items_total`` does; an item that was not tokenized has its error twice."""
    if isinstance(outcome, NonFiniteReward):
        return "non_finite"
    if isinstance(outcome, RequestRefused):
        return "invalid"
    if isinstance(outcome, HttpError):
        return "error"
    return "truncated" if isinstance(sequence, TokenSequence) and sequence.truncated else "ok"
