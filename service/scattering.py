"""Scatters a large request over the replicas of its application and gathers what their engines return.

It knows replicas by name only; how they are reached is behind `Siblings`. Exactly one result is recorded for each
shard: a shard whose replica fails, refuses or dies is computed by another one, at last by the own engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from service.errors import DeadlineExceeded, HttpError, InternalError
from service.metrics import Metrics
from service.request_shard import RequestShard, ShardResult
from service.request_state import RequestState
from service.scheduling.scatter import ReplicaLoad, ShardPlan, num_tokens, own_tokens, plan_shards, select
from service.scheduling.work import Work

logger = logging.getLogger(__name__)

MAX_SIBLINGS_TRIED = 2
"""Siblings that are asked for a shard before the own engine computes it."""

CHECK_S = 5.0
"""Seconds after which a shard's replica is looked for among the siblings again."""
MAX_MISSES = 2
"""Checks that a sibling may be missing at before its shard is computed elsewhere: its machine may have disappeared
without closing the connection. A sibling that leaves in order is missing too; its shard may then be computed twice."""


class Siblings(Protocol):
    """The other replicas of the application that serve the same model with the same code."""

    async def loads(self) -> Sequence[ReplicaLoad]:
        """Return the load of each sibling that accepts shards; empty where this replica is the only one."""
        ...

    async def compute(self, name: str, shard: RequestShard) -> ShardResult:
        """Let a sibling compute a shard; if cancelled, so is the work of the sibling.

        Raises:
            HttpError: the sibling refused it or failed on it.
            Exception: it could not be reached, or died.
        """
        ...


ComputeHere: TypeAlias = Callable[[Work, RequestState, float], Awaitable[ShardResult]]
"""Computes a part of a request's work on the own engine by the given deadline."""


@dataclass(frozen=True, slots=True)
class ScatterRule:
    """Which requests are scattered, and over how many replicas."""

    build: str
    """Model version and code of this replica."""

    min_tokens: int
    """Tokens of a request from which on it is scattered."""

    shares_prefixes: bool
    """Whether the engine computes common prefixes once."""

    @property
    def min_shard_tokens(self) -> int:
        """Fewest tokens of an average shard."""
        return max(1, self.min_tokens // 2)


class Scatterer:
    """Scatters requests; used on one event loop.

    Args:
        siblings: the other replicas.
        rule: which requests are scattered.
        compute_here: runs a shard on the own engine.
        own_load: tokens that wait for the own engine.
        metrics: of this replica.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        siblings: Siblings,
        rule: ScatterRule,
        compute_here: ComputeHere,
        own_load: Callable[[], int],
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._siblings = siblings
        self._rule = rule
        self._compute_here = compute_here
        self._own_load = own_load
        self._metrics = metrics
        self._clock = clock
        self._running: set[RequestState] = set()

    def is_large(self, work: Work) -> bool:
        """Whether a request has enough tokens to be scattered where there are siblings."""
        return num_tokens(work) >= self._rule.min_tokens

    async def own_tokens(self, num_tokens: int) -> int:
        """Estimate how many tokens the own engine computes of a request with an estimated number of tokens."""
        if num_tokens < self._rule.min_tokens:
            return num_tokens
        waiting = [sibling.waiting_tokens for sibling in await self._siblings.loads()]
        return own_tokens(num_tokens, self._own_load(), waiting, min_tokens=self._rule.min_shard_tokens)

    async def siblings(self) -> Sequence[ReplicaLoad]:
        """Return the load of each sibling; empty where this replica is the only one."""
        return await self._siblings.loads()

    def plan(self, work: Work, siblings: Sequence[ReplicaLoad]) -> ShardPlan | None:
        """Return the indices of the sequences by replica, the own one under an empty name; None: not scattered."""
        own, rule = ReplicaLoad("", self._own_load()), self._rule
        plan = plan_shards(work, own, siblings, min_tokens=rule.min_shard_tokens, shares_prefixes=rule.shares_prefixes)
        return None if plan.keys() <= {""} else plan

    def start(self, state: RequestState, plan: ShardPlan, deadline: float) -> asyncio.Task[None]:
        """Start to compute all shards of a request; ``state.computed`` is done when all are, or one has failed.

        The caller cancels the task when the request ends before that.
        """
        return asyncio.ensure_future(self._run(state, plan, deadline))

    def fail_all(self, error: Callable[[], HttpError]) -> None:
        """End every scattered request that is not answered with a new error."""
        for state in list(self._running):
            state.fail(error())

    async def _run(self, state: RequestState, plan: ShardPlan, deadline: float) -> None:
        self._running.add(state)
        try:
            async with asyncio.TaskGroup() as group:
                for name, indices in plan.items():
                    group.create_task(self._run_shard(state, name, indices, deadline))
        except* HttpError as errors:
            state.fail(_first_of(errors))
        except* Exception as errors:
            logger.exception("Scattering a request failed.", exc_info=errors)
            state.fail(InternalError("Scattering the request failed."))
        finally:
            self._running.discard(state)

    async def _run_shard(self, state: RequestState, name: str, indices: tuple[int, ...], deadline: float) -> None:
        work = select(state.work, indices)
        result = await self._computed(work, state, name, deadline)
        state.record_times(result.queue_s, result.engine_s)
        for index, outcome, shared_tokens in zip(indices, result.outcomes, result.shared_tokens, strict=True):
            state.resolve(index, outcome, shared_tokens)

    async def _computed(self, work: Work, state: RequestState, name: str, deadline: float) -> ShardResult:
        """Return the result of a shard from the named replica, or from another one where that fails."""
        tried: set[str] = set()
        while name:
            try:
                result = await self._ask(name, work, state, deadline)
            except DeadlineExceeded:
                raise
            except Exception as error:  # noqa: BLE001
                # Whatever happened there, this replica or another one can compute the shard: scoring is pure.
                logger.warning("A shard of %d sequences failed on %s: %r", len(work.sequences), name, error)
                self._metrics.shards.labels(outcome="retried").inc()
                tried.add(name)
                name = await self._next_sibling(tried)
            else:
                self._metrics.shards.labels(outcome="sibling").inc()
                return result
        result = await self._compute_here(work, state, deadline)
        self._metrics.shards.labels(outcome="here").inc()
        return result

    async def _ask(self, name: str, work: Work, state: RequestState, deadline: float) -> ShardResult:
        shard = RequestShard(work, state.level, deadline - self._clock(), self._rule.build)
        result = await self._watched(name, asyncio.ensure_future(self._siblings.compute(name, shard)))
        if len(result.outcomes) != len(work.sequences) or len(result.shared_tokens) != len(work.sequences):
            raise InternalError("A sibling returned the wrong number of results.")
        return result

    async def _watched(self, name: str, call: asyncio.Future[ShardResult]) -> ShardResult:
        """Return the result of a call to a sibling.

        Raises:
            ConnectionError: the sibling is not one of the application's replicas any more.
        """
        misses = 0
        try:
            while not (await asyncio.wait({call}, timeout=CHECK_S))[0]:
                present = {load.name for load in await self._siblings.loads()}
                misses = 0 if name in present else misses + 1
                if misses >= MAX_MISSES:
                    raise ConnectionError("The replica has gone.")
            return call.result()
        finally:
            call.cancel()

    async def _next_sibling(self, tried: set[str]) -> str:
        """Return the sibling with the least waiting work that was not asked yet; empty: the own engine is next."""
        if len(tried) >= MAX_SIBLINGS_TRIED:
            return ""
        loads = [load for load in await self._siblings.loads() if load.name not in tried]
        return min(loads, key=lambda load: load.waiting_tokens).name if loads else ""


def _first_of(errors: BaseExceptionGroup[HttpError]) -> HttpError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, HttpError)  # noqa: S101 - the group holds nothing else
    return error
