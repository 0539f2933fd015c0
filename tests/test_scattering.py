"""Scattering of large requests over scorers in this process: every item gets its one right answer, whatever fails."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import pytest

from service import scattering
from service.engines.oracle import RAISE_BYTE, OracleEngine, OracleFaults, byte_tokenizer, oracle_reward_of_text
from service.errors import DeadlineExceeded, Draining, EngineFailed, HttpError, Overloaded
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.records import Encoding, Exchange, Item, Score, ScoreRequest
from service.request_shard import RequestShard, ShardResult
from service.request_state import ScoredRequest
from service.scheduling.scatter import ReplicaLoad
from service.scorer import Scorer
from service.settings import BatchingSettings, LimitSettings, ScatterSettings, TokenizationSettings
from service.tokenization import Tokenization

TOKENS = 256
_Message = TypeVar("_Message")
Intercept = Callable[[str, RequestShard], None]


def copied(message: _Message) -> _Message:
    """The message as the other side gets it."""
    return cast("_Message", pickle.loads(pickle.dumps(message)))  # noqa: S301 - the test's own


@dataclass
class Replicas:
    """Scorers by name that reach each other by pickled messages, as over the network."""

    scorers: dict[str, Scorer] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    intercept: Intercept = lambda name, shard: None
    both_asked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once both siblings of three replicas compute a shard."""
    asked: set[str] = field(default_factory=set)

    async def loads(self) -> Sequence[ReplicaLoad]:
        return [ReplicaLoad(name, scorer.queued_tokens) for name, scorer in self.scorers.items() if name != "first"]

    async def compute(self, name: str, shard: RequestShard) -> ShardResult:
        self.intercept(name, shard)
        self.asked.add(name)
        if len(self.asked) == 2:
            asyncio.get_running_loop().call_later(0.02, self.both_asked.set)
        return copied(await self.scorers[name].compute_shard(copied(shard)))

    def shards(self, outcome: str) -> float:
        value = self.metrics["first"].registry.get_sample_value("rm_request_shards_total", {"outcome": outcome})
        assert value is not None
        return value

    def scored(self, name: str) -> float:
        value = self.metrics[name].registry.get_sample_value("rm_items_total", {"outcome": "ok"})
        assert value is not None
        return value


@asynccontextmanager
async def replicas(num: int = 3, faults: OracleFaults | None = None) -> AsyncIterator[Replicas]:
    """Started scorers, of which the one named first scatters its requests."""
    tokenizer = byte_tokenizer(TOKENS)
    tokenization = Tokenization(tokenizer, TokenizationSettings(), max_input_tokens=TOKENS, vocab_size=len(tokenizer))
    all_ = Replicas()
    for name in ["first", "second", "third", "fourth"][:num]:
        engine = OracleEngine(max_input_tokens=TOKENS, max_batch_tokens=512, faults=faults)
        all_.metrics[name] = Metrics()
        all_.scorers[name] = scorer = Scorer(
            tokenization, Pipeline(engine), LimitSettings(), BatchingSettings(), all_.metrics[name]
        )
        await scorer.start()
    all_.scorers["first"].scatter_over(all_, ScatterSettings(min_tokens=1000), "build")
    try:
        yield all_
    finally:
        for scorer in all_.scorers.values():
            await scorer.stop(drain_s=0)


def texts(num_items: int) -> list[tuple[str, str]]:
    return [(f"question {number // 4}? ", f"answer {number} " * (1 + number % 3)) for number in range(num_items)]


def request(pairs: Sequence[tuple[str, str]], timeout_s: float = 60) -> ScoreRequest:
    items = tuple(Item(Exchange(prompt, completion)) for prompt, completion in pairs)
    return ScoreRequest(items, Encoding(template="concat"), "basic", timeout_s)


def rewards(scored: ScoredRequest) -> list[float | type[HttpError] | None]:
    return [outcome.reward if isinstance(outcome, Score) else type(outcome) for outcome in scored.outcomes]


def expected(pairs: Sequence[tuple[str, str]]) -> list[float]:
    return [oracle_reward_of_text(prompt, completion) for prompt, completion in pairs]


async def test_all_replicas_compute_one_request() -> None:
    """Three replicas share a request; rewards, groups, usage and metrics are those of one replica."""
    pairs = texts(200)
    async with replicas() as all_:
        scored = await all_.scorers["first"].score(request(pairs))
        shards = all_.shards("here"), all_.shards("sibling")
        counted = {name: all_.scored(name) for name in all_.scorers}
    async with replicas(1) as alone:
        plain = await alone.scorers["first"].score(request(pairs))

    assert rewards(scored) == expected(pairs)
    assert scored.outcomes == plain.outcomes
    assert scored.usage == plain.usage
    assert all(
        outcome.group is not None and outcome.group.n == 4 for outcome in scored.outcomes if isinstance(outcome, Score)
    )
    assert shards == (1.0, 2.0)
    assert counted == {"first": 200, "second": 0, "third": 0}


async def test_admission_counts_the_own_share_only() -> None:
    """A request that one replica could not compute in time is accepted where siblings compute parts of it."""
    faults = OracleFaults(seconds_per_token=1e-4)
    pairs = texts(1000)
    # For one engine 3.6 s of work, more than the half of the deadline that admission counts on; for three 1.2 s.
    fills = [request(texts(20)), request(pairs, timeout_s=6)]

    async def outcome(num: int) -> ScoredRequest | BaseException:
        async with replicas(num, faults) as all_:
            scorer = all_.scorers["first"]
            tasks = [asyncio.create_task(scorer.score(fill)) for fill in fills]
            return (await asyncio.gather(*tasks, return_exceptions=True))[1]

    shared, alone = await outcome(3), await outcome(1)

    assert isinstance(shared, ScoredRequest)
    assert rewards(shared) == expected(pairs)
    assert isinstance(alone, Overloaded)


async def test_small_requests_are_not_scattered() -> None:
    """Below the threshold no sibling is even asked for its load."""
    async with replicas() as all_:
        all_.loads = None  # type: ignore[method-assign, assignment]  # calling it would fail
        scored = await all_.scorers["first"].score(request(texts(4)))

    assert rewards(scored) == expected(texts(4))


@pytest.mark.parametrize(
    "failure", [ConnectionError("died"), Draining("stops"), Overloaded("full", 1.0), ValueError("unreadable")]
)
async def test_a_failing_sibling_is_replaced(failure: Exception) -> None:
    """The shards of a sibling that dies or refuses are computed by another one, once, and no answer is lost."""

    def intercept(name: str, _: RequestShard) -> None:
        if name == "second":
            raise failure

    pairs = texts(200)
    async with replicas() as all_:
        all_.intercept = intercept
        scored = await all_.scorers["first"].score(request(pairs))
        retried = all_.shards("retried")

    assert rewards(scored) == expected(pairs)
    assert retried == 1


async def test_without_any_sibling_the_own_engine_computes_all() -> None:
    """Where every sibling fails, the replica that received the request computes all shards itself."""

    def intercept(_name: str, _shard: RequestShard) -> None:
        raise ConnectionError

    pairs = texts(200)
    async with replicas() as all_:
        all_.intercept = intercept
        scored = await all_.scorers["first"].score(request(pairs))
        here = all_.shards("here")

    assert rewards(scored) == expected(pairs)
    assert here == 3


async def test_a_sibling_that_vanishes_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sibling that never answers, and that Ray does not list any more, costs no answer."""
    monkeypatch.setattr(scattering, "CHECK_S", 0.05)
    never = asyncio.Event()

    class Vanishing(Replicas):
        async def loads(self) -> Sequence[ReplicaLoad]:
            return [load for load in await super().loads() if load.name not in self.asked or load.name != "second"]

        async def compute(self, name: str, shard: RequestShard) -> ShardResult:
            if name == "second":
                self.asked.add(name)
                await never.wait()
            return await super().compute(name, shard)

    pairs = texts(200)
    async with replicas() as all_:
        all_.__class__ = Vanishing
        scored = await all_.scorers["first"].score(request(pairs))
        retried = all_.shards("retried")

    assert rewards(scored) == expected(pairs)
    assert retried == 1


async def test_item_errors_come_back() -> None:
    """A sequence on which a sibling's engine fails is an error in its place, and only that one."""
    pairs = texts(200)
    bad = 137
    pairs[bad] = (pairs[bad][0], f"{chr(RAISE_BYTE)} bad")
    async with replicas(faults=OracleFaults(raise_on=RAISE_BYTE)) as all_:
        scored = await all_.scorers["first"].score(request(pairs))

    results = rewards(scored)
    assert results[bad] is EngineFailed
    assert [result for index, result in enumerate(results) if index != bad] == [
        reward for index, reward in enumerate(expected(pairs)) if index != bad
    ]


async def test_the_deadline_travels() -> None:
    """A request that is too slow ends at its deadline, and nothing of it waits on any replica afterwards."""
    async with replicas(faults=OracleFaults(seconds_per_token=1e-4)) as all_:
        with pytest.raises(DeadlineExceeded):
            await all_.scorers["first"].score(request(texts(200), timeout_s=0.1))
        await asyncio.sleep(0.1)
        waiting = {name: scorer.queued_tokens for name, scorer in all_.scorers.items()}

    assert set(waiting.values()) == {0}


async def test_cancellation_travels() -> None:
    """A client that leaves takes its work off the queues of all replicas."""
    async with replicas(faults=OracleFaults(seconds_per_token=1e-4)) as all_:
        task = asyncio.create_task(all_.scorers["first"].score(request(texts(200))))
        await all_.both_asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.01)
        waiting = {name: scorer.queued_tokens for name, scorer in all_.scorers.items()}

    assert set(waiting.values()) == {0}


async def test_a_replica_that_stops_answers_scattered_requests() -> None:
    """At the end of the drain a request whose shards wait elsewhere gets an error, as every other accepted one."""
    async with replicas(faults=OracleFaults(seconds_per_token=1e-3)) as all_:
        task = asyncio.create_task(all_.scorers["first"].score(request(texts(200))))
        await all_.both_asked.wait()
        await all_.scorers["first"].stop(drain_s=0)

        with pytest.raises(Draining):
            await task
