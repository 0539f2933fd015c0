"""The asyncio side of scoring: admit, tokenize, queue, and answer every accepted item exactly once.

The event loop admits requests, queues them and answers them; a pool of threads tokenizes; the thread of the
`EngineLoop` runs the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, Protocol, TypeAlias, TypeVar

from service.diagnostics.monitors.monitor import Monitors
from service.diagnostics.text import TextFacts
from service.engine_loop import EngineLoop, engine_died
from service.errors import DeadlineExceeded, Draining, EngineUnavailable, HttpError, NotReady
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.records import Encoding, Item, ScoreRequest, TokenSequence
from service.request_admission import RequestAdmission
from service.request_shard import RequestShard, ShardResult, ShardState
from service.request_state import RequestState, ScoredRequest
from service.request_weights import with_weights
from service.scattering import Scatterer, ScatterRule, Siblings
from service.scheduling.budget import BatchBudget
from service.scheduling.queue import Queue
from service.scheduling.scatter import num_tokens as tokens_of
from service.scheduling.work import SMALL_REQUEST_ITEMS, Work, chunks_of, is_small_chunk, plan_work
from service.scoring_metrics import ScoringMetrics
from service.settings import BatchingSettings, LimitSettings, ScatterSettings
from service.work_queue import WorkQueue

State: TypeAlias = Literal["starting", "ready", "draining", "failed"]
_Result = TypeVar("_Result")
_TextReading: TypeAlias = "asyncio.Future[list[TextFacts | None]]"

ENGINE_STOP_S = 5.0
"""How long `Scorer.stop` waits for the running pass; afterwards the process may end without it."""


class Encoder(Protocol):
    """The methods of tokenization that the scorer calls; safe to call from several threads."""

    @property
    def sample_token_ids(self) -> Sequence[int]:
        """Ordinary token ids, of which warm-up batches are made."""
        ...

    def encode(self, items: Sequence[Item], encoding: Encoding) -> Sequence[TokenSequence | HttpError]:
        """Return a TokenSequence or an error for each item, in order."""
        ...

    def estimate_tokens(self, items: Sequence[Item]) -> int:
        """Estimate the tokens of the items without tokenizing."""
        ...


class Scorer:
    """Scores requests on one engine, many at a time.

    Args:
        encoder: turns items into token sequences.
        pipeline: the pipeline of an engine that nothing else uses.
        limits: limits of requests and of waiting work.
        batching: the budget of a pass.
        metrics: the metrics of this replica.
        monitors: that observe the answers; None: there are none.
        num_tokenizer_threads: threads in addition to the event loop.
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
        budget = BatchBudget(
            info.cost, batching.max_batch_tokens or info.max_batch_tokens, batching.max_batch_sequences
        )
        self._encoder = encoder
        self._pipeline = pipeline
        self._limits = limits
        self._monitors = monitors
        self._clock = clock
        self._state: State = "starting"
        self._threads = ThreadPoolExecutor(num_tokenizer_threads, thread_name_prefix="tokenize")
        self._keys = itertools.count()
        self._num_accepted = 0
        self._all_answered = asyncio.Event()
        self._all_answered.set()
        queue = Queue(limits.max_queue_tokens, info.min_shared_prefix_tokens, batch_tokens=budget.max_tokens)
        self._queue = WorkQueue(queue, clock)
        self._scatterer: Scatterer | None = None
        self._replica_metrics = metrics
        self._metrics = ScoringMetrics(metrics, info.outputs)
        self._metrics.read_queue(
            lambda: len(self._queue), lambda: self._queue.num_waiting_tokens, self._queue.oldest_wait_s
        )
        self._admission = RequestAdmission(
            self._queue, limits.max_queue_tokens, self.refuse_unless_ready, self._metrics, clock
        )
        self._engine_loop = EngineLoop(pipeline, self._queue, budget, encoder.sample_token_ids, self._metrics, clock)

    # --- Life cycle --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """``ready`` accepts requests; ``draining`` answers those it has accepted; ``failed`` must be replaced."""
        return self._state

    @property
    def pipeline(self) -> Pipeline:
        """The pipeline of the batches; for jobs that run their own batches while the scorer is not started."""
        return self._pipeline

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the engine; those of requests that are being tokenized are estimated."""
        return self._queue.num_waiting_tokens

    @property
    def queue_s(self) -> float:
        """Seconds of engine time that wait in the queue, at the recent throughput; 0 until that is measured."""
        tokens_per_s = self._queue.tokens_per_s
        return self.queued_tokens / tokens_per_s if tokens_per_s else 0.0

    @property
    def engine_busy_s(self) -> float:
        """Seconds for which the engine has been running batches since its start."""
        return self._engine_loop.total_busy_s

    @property
    def budget(self) -> BatchBudget:
        """The current budget of a pass; it shrinks when the device runs out of memory."""
        return self._engine_loop.budget

    @property
    def is_engine_alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._engine_loop.is_alive

    async def start(self) -> None:
        """Start the engine thread and warm the engine up; return when requests are accepted.

        Raises:
            WarmUpFailed: the largest legal batch does not run.
        """
        await self._engine_loop.start(on_death=partial(self._enter, "failed"))
        if self._state == "starting":
            self._enter("ready")

    def scatter_over(self, siblings: Siblings, settings: ScatterSettings, build: str) -> None:
        """Let the replicas of this application compute parts of large requests; called once, after `start`.

        Args:
            siblings: the other replicas.
            settings: which requests are large.
            build: model version and code of this replica; shards are exchanged between equal ones only.
        """
        min_tokens = settings.min_tokens or 2 * self.budget.max_tokens
        shares_prefixes = self._pipeline.engine.info.min_shared_prefix_tokens is not None
        self._scatterer = Scatterer(
            siblings,
            ScatterRule(build, min_tokens, shares_prefixes),
            self._compute_here,
            lambda: self.queued_tokens,
            self._replica_metrics,
            self._clock,
        )

    async def stop(self, drain_s: float) -> None:
        """Accept no more requests, finish accepted ones one by one for up to ``drain_s``, then end the engine thread.

        What is not answered by then gets Draining. May be called again; a pass that hangs is abandoned.
        """
        self._queue.finish_one_by_one()
        if self._state != "failed":
            self._enter("draining")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_answered.wait(), drain_s)
        self._queue.close()
        self._queue.fail_all(_shut_down)
        if self._scatterer is not None:
            self._scatterer.fail_all(_shut_down)
        await self._engine_loop.join(ENGINE_STOP_S)
        self._threads.shutdown(wait=False)

    def check_health(self) -> None:
        """Return if the engine works.

        Raises:
            EngineUnavailable: its thread has died, or one batch has run for longer than any caller may wait.
        """
        if self._state == "failed":
            raise engine_died()
        if self._engine_loop.busy_s > self._limits.deadline_s:
            raise EngineUnavailable(f"A batch has been running for more than {self._limits.deadline_s:g} s.")

    def _enter(self, state: State) -> None:
        self._state = state
        self._metrics.set_ready(is_ready=state == "ready")

    # --- One request -------------------------------------------------------------------------------------------------

    async def score(self, request: ScoreRequest, *, age_s: float = 0.0) -> ScoredRequest:
        """Score a request; exactly one answer comes, as a value or as an exception.

        Args:
            request: the request.
            age_s: seconds since it arrived, which its deadline includes.

        Raises:
            Overloaded, NotReady, Draining, EngineUnavailable: it was refused before any work.
            DeadlineExceeded: its deadline has passed; sequences that still wait are not computed.
            EngineUnavailable, Draining: the replica ended before it was answered.
            CancelledError: the client disconnected; sequences that still wait are not computed.
        """
        num_items = len(request.items)
        handed_over = self._clock()
        arrived = handed_over - age_s
        timeout_s = min(request.timeout_s, self._limits.deadline_s)
        key = next(self._keys)
        await self._admission.reserve(request, key, self._estimate_own_tokens, arrived + timeout_s)
        self._accept(num_items)
        try:
            async with asyncio.timeout(arrived + timeout_s - self._clock()):
                return await self._score_accepted(key, request, arrived, handed_over, arrived + timeout_s)
        except (TimeoutError, DeadlineExceeded):
            self._metrics.count_items(num_items, "expired")
            raise DeadlineExceeded(f"No answer within {timeout_s:g} s.") from None
        except asyncio.CancelledError:
            self._metrics.count_items(num_items, "cancelled")
            raise
        except BaseException:
            self._metrics.count_items(num_items, "error")
            raise
        finally:
            self._release(key, num_items)

    async def _estimate_own_tokens(self, items: Sequence[Item]) -> int:
        """Estimate how many tokens of a request the own engine computes: of a large one siblings compute parts."""
        num_tokens = self._encoder.estimate_tokens(items)
        return num_tokens if self._scatterer is None else await self._scatterer.own_tokens(num_tokens)

    def refuse_unless_ready(self) -> None:
        """Return if requests are accepted.

        Raises:
            NotReady, Draining, EngineUnavailable: they are not.
        """
        if self._state == "starting":
            raise NotReady("The model is loading or warming up.")
        if self._state == "draining":
            raise Draining("This replica takes no new requests.")
        if self._state == "failed":
            raise engine_died()

    def _refuse_if_stopped(self) -> None:
        """Raise if the queue is no longer served; checked wherever a request resumes after an await."""
        if self._state == "failed":
            raise engine_died()
        if self._queue.is_closed:
            raise _shut_down()

    def _accept(self, num_items: int) -> None:
        self._num_accepted += 1
        self._all_answered.clear()
        self._metrics.add_in_flight(num_items)

    def _release(self, key: Hashable, num_items: int) -> None:
        self._queue.cancel(key)
        self._metrics.add_in_flight(-num_items)
        self._num_accepted -= 1
        if not self._num_accepted:
            self._all_answered.set()

    async def _score_accepted(
        self, key: Hashable, request: ScoreRequest, arrived: float, handed_over: float, deadline: float
    ) -> ScoredRequest:
        begin = self._clock()
        encoded, work = await self._encode(request)
        queued = self._clock()
        state = RequestState(request, encoded, work, queued)
        scattered = await self._queue_or_scatter(key, state, queued, deadline)
        try:
            readings = self._read_texts(state)
            await state.computed
        finally:
            if scattered is not None:
                scattered.cancel()
        await self._complete(state, readings)
        scored = state.scored(queued - begin, self._clock() - arrived, admission_s=begin - handed_over)
        self._metrics.observe_request(scored, state.items)
        if self._monitors is not None:
            self._monitors.observe_request(state.items, request.run_id)
        return scored

    async def _queue_or_scatter(
        self, key: Hashable, state: RequestState, queued: float, deadline: float
    ) -> asyncio.Task[None] | None:
        """Put a request into the queue, or start to compute a large one on several replicas; return that task."""
        scatterer, plan = self._scatterer, None
        if scatterer is not None and scatterer.is_large(state.work):
            siblings = await scatterer.siblings()
            self._queue.cancel(key)  # the reservation, which is not a load that this request has to wait for
            plan = scatterer.plan(state.work, siblings)
        self._refuse_if_stopped()
        if scatterer is None or plan is None:
            self._queue.put(key, state, now=queued, deadline=deadline)
            return None
        return scatterer.start(state, plan, deadline)

    async def _compute_here(self, work: Work, state: RequestState, deadline: float) -> ShardResult:
        """Compute a part of an accepted request on the own engine."""
        self._refuse_if_stopped()
        return await self._compute(next(self._keys), ShardState(work, state.level, self._clock()), deadline)

    async def compute_shard(self, shard: RequestShard) -> ShardResult:
        """Compute a shard of a request that another replica has received.

        It is neither a request nor an item of this replica: metrics count its batches only.

        Raises:
            HttpError: as `score`.
            CancelledError: the other replica does not need it any more.
        """
        key, now = next(self._keys), self._clock()
        deadline = now + min(shard.timeout_s, self._limits.deadline_s)
        self._admission.reserve_now(key, tokens_of(shard.work), deadline)
        self._accept(0)
        try:
            async with asyncio.timeout(deadline - now):
                return await self._compute(key, ShardState(shard.work, shard.level, now), deadline)
        except TimeoutError:
            raise DeadlineExceeded("The deadline of the shard has passed.") from None
        finally:
            self._release(key, 0)

    async def _compute(self, key: Hashable, state: ShardState, deadline: float) -> ShardResult:
        self._queue.put(key, state, now=self._clock(), deadline=deadline)
        try:
            await state.computed
        finally:
            self._queue.cancel(key)
        return state.result()

    async def _encode(self, request: ScoreRequest) -> tuple[list[TokenSequence | HttpError], Work]:
        encoded: list[TokenSequence | HttpError] = []
        for chunk in chunks_of(request.items):
            self._refuse_if_stopped()
            encoded += await self._process(chunk, self._encoder.encode, chunk, request.encoding)
        if len(encoded) <= SMALL_REQUEST_ITEMS:
            return encoded, plan_work(request.items, encoded)
        self._refuse_if_stopped()
        loop = asyncio.get_running_loop()
        return encoded, await loop.run_in_executor(self._threads, plan_work, request.items, encoded)

    def _read_texts(self, state: RequestState) -> list[_TextReading]:
        """Start to analyse the texts in the tokenizer threads; the forward pass runs meanwhile."""
        level = state.request.diagnostics
        if level == "none" or self._queue.is_closed:
            return []
        read, states = self._pipeline.diagnostician.read_texts, iter(state.items)
        return [
            self._process(chunk, read, list(itertools.islice(states, len(chunk))), level)
            for chunk in chunks_of(state.request.items)
        ]

    async def _complete(self, state: RequestState, readings: Sequence[_TextReading]) -> None:
        """Add the diagnostics to the Scores of a request, once the engine has computed all of it."""
        if state.request.weights is not None:
            state.complete(with_weights(state.outcomes, self._pipeline.rule, state.request.weights))
        if readings:
            state.record_texts([text for reading in readings for text in await reading])
        complete = partial(self._pipeline.diagnostician.complete, state.items, state.request.diagnostics)
        if len(state.items) <= SMALL_REQUEST_ITEMS or self._queue.is_closed:
            state.complete(complete())
        else:
            state.complete(await asyncio.get_running_loop().run_in_executor(self._threads, complete))

    def _process(self, chunk: Sequence[Item], work: Callable[..., _Result], *args: object) -> asyncio.Future[_Result]:
        """Start work on a chunk in a tokenizer thread, or do it at once where the thread would take longer."""
        loop = asyncio.get_running_loop()
        if is_small_chunk(chunk):
            done: asyncio.Future[_Result] = loop.create_future()
            done.set_result(work(*args))
            return done
        return loop.run_in_executor(self._threads, partial(work, *args))


def _shut_down() -> Draining:
    return Draining("The replica shut down before it answered this request.")
