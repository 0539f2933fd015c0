"""Launching ahead: one batch is started before the one in flight has ended, and each item gets exactly one answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import pytest
from launching_engine import LaunchingOracle

from service.engines.oracle import OracleEngine, byte_tokenizer, oracle_reward, oracle_reward_of_text
from service.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineOutOfMemory,
    EngineUnavailable,
    HttpError,
    NonFiniteReward,
    OutputMismatch,
)
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.records import Encoding, Exchange, Item, Score, ScoreRequest, TokenSequence
from service.request_state import ScoredRequest
from service.scorer import Scorer
from service.settings import BatchingSettings, LimitSettings, TokenizationSettings
from service.tokenization import Tokenization

PROMPT = "How do I boil an egg? "
BAD = ord("#")
"""A token that triggers the faults of the tests."""


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    tokenizer = byte_tokenizer(256)
    return Tokenization(tokenizer, TokenizationSettings(), max_input_tokens=256, vocab_size=len(tokenizer))


def new_scorer(
    tokenization: Tokenization,
    engine: OracleEngine,
    *,
    metrics: Metrics | None = None,
    clock: Callable[[], float] | None = None,
) -> Scorer:
    pipeline = Pipeline(engine)
    metrics = metrics or Metrics()
    if clock is None:
        return Scorer(tokenization, pipeline, LimitSettings(), BatchingSettings(), metrics)
    return Scorer(tokenization, pipeline, LimitSettings(deadline_s=60), BatchingSettings(), metrics, clock=clock)


@asynccontextmanager
async def running(scorer: Scorer, engine: LaunchingOracle) -> AsyncIterator[Scorer]:
    await scorer.start()
    try:
        yield scorer
    finally:
        engine.open()
        await scorer.stop(drain_s=0)


def request(*completions: str, timeout_s: float = 60) -> ScoreRequest:
    items = tuple(Item(Exchange(PROMPT, completion)) for completion in completions)
    return ScoreRequest(items, Encoding(template="concat"), "none", timeout_s)


def expected(*completions: str) -> list[float]:
    return [oracle_reward_of_text(PROMPT, completion) for completion in completions]


def rewards(scored: ScoredRequest) -> list[float | type[HttpError] | None]:
    return [outcome.reward if isinstance(outcome, Score) else type(outcome) for outcome in scored.outcomes]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("The condition did not become true.")


async def send(scorer: Scorer, engine: LaunchingOracle, *loads: Sequence[str]) -> list[asyncio.Task[ScoredRequest]]:
    """Send requests, and let the engine launch when all of them wait; the passes do not end before the gate opens."""
    engine.gate.clear()
    engine.door.clear()
    tasks = [asyncio.create_task(scorer.score(request(*load))) for load in loads]
    await until(lambda: len(scorer._queue._requests) == len(loads))
    engine.door.set()
    return tasks


def raising(error: BaseException, *, more_than: int = 0) -> Callable[[Sequence[TokenSequence]], None]:
    """Return a fault of batches with the bad token and more than this many sequences."""

    def fault(sequences: Sequence[TokenSequence]) -> None:
        if len(sequences) > more_than and any(BAD in sequence.token_ids for sequence in sequences):
            raise error

    return fault


# --- The pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["at_launch", "on_device"])
@pytest.mark.parametrize("error", [RuntimeError("device-side assert"), EngineOutOfMemory("no room")], ids=type)
def test_a_pass_that_fails_late_is_bisected(where: str, error: Exception) -> None:
    """Wherever a launched batch raises, only the failing sequence gets an error, and the others get their rewards."""
    sequences = [TokenSequence((60 + index, 9)) for index in range(16)]
    sequences[5] = TokenSequence((BAD, 9))
    faults: dict[str, Any] = {where: raising(error)}
    pipeline = Pipeline(LaunchingOracle(**faults))

    outcome = pipeline.finish(pipeline.start(sequences, ["none"] * 16))

    failure = EngineOutOfMemory if isinstance(error, EngineOutOfMemory) else EngineFailed
    assert [type(entry) for entry in outcome.outcomes] == [Score] * 5 + [failure] + [Score] * 10
    assert outcome.out_of_memory == (failure is EngineOutOfMemory)
    assert outcome.num_forwards <= 9


def test_two_started_batches_get_their_own_rewards() -> None:
    """A batch that is started before the previous one is finished gets the rewards of its own sequences."""
    first, second = [[TokenSequence((60 + index, start)) for index in range(4)] for start in (1, 2)]
    pipeline = Pipeline(LaunchingOracle())

    started = [pipeline.start(batch, ["none"] * 4) for batch in (first, second)]
    outcomes = [pipeline.finish(batch).outcomes for batch in started]

    for batch, found in zip((first, second), outcomes, strict=True):
        assert list(found) == [Score(oracle_reward(sequence.token_ids)) for sequence in batch]


def test_overlapping_time_counts_once() -> None:
    """The forward time of a batch counts from the end of the previous one, so that the sum is at most wall time."""
    ticks = count()
    pipeline = Pipeline(LaunchingOracle(), clock=lambda: float(next(ticks)))
    first, second = (pipeline.start([TokenSequence((9,))], ["none"]) for _ in range(2))

    outcomes = [pipeline.finish(batch) for batch in (first, second)]

    assert sum(outcome.forward_s + outcome.diagnose_s for outcome in outcomes) <= next(ticks)
    assert all(outcome.forward_s > 0 for outcome in outcomes)


def test_an_engine_that_cannot_launch_ahead_runs_in_finish() -> None:
    """Without launching ahead ``start`` computes nothing, and ``finish`` runs the pass."""

    class Counting(OracleEngine):
        num_passes = 0

        def forward(self, sequences, *, states=False):
            self.num_passes += 1
            return super().forward(sequences)

    engine = Counting()
    pipeline = Pipeline(engine)
    assert pipeline.passes_ahead == 0

    batch = pipeline.start([TokenSequence((9,))], ["none"])
    assert engine.num_passes == 0
    pipeline.finish(batch)

    assert engine.num_passes == 1


@pytest.mark.parametrize("where", ["at_launch", "on_device"])
def test_a_lost_device_is_not_bisected(where: str) -> None:
    """If the device is lost no smaller batch is tried: the error is raised to the owner of the thread."""
    faults: dict[str, Any] = {where: raising(EngineUnavailable("lost"))}
    pipeline = Pipeline(LaunchingOracle(**faults))
    batch = pipeline.start([TokenSequence((BAD,)), TokenSequence((9,))], ["none"] * 2)

    with pytest.raises(EngineUnavailable):
        pipeline.finish(batch)


# --- The scorer ------------------------------------------------------------------------------------------------------


async def test_one_batch_is_prefetched_and_no_more(tokenization: Tokenization) -> None:
    """While a pass runs the next one is launched; a third stays in the queue, where its batch may still grow."""
    engine = LaunchingOracle(max_batch_tokens=len(PROMPT) + 8)
    async with running(new_scorer(tokenization, engine), engine) as scorer:
        engine.launched.clear()
        sent = await send(scorer, engine, *([f"item {index}"] for index in range(5)))
        await until(lambda: len(engine.launched) == 2)
        await asyncio.sleep(0.05)
        assert len(engine.launched) == 2
        assert len([task for task in sent if task.done()]) == 0
        engine.gate.set()
        scored = await asyncio.gather(*sent)

    assert [rewards(one) for one in scored] == [expected(f"item {index}") for index in range(5)]
    assert engine.max_in_flight == 2
    assert engine.closed


async def test_a_lone_pass_is_answered_without_waiting_for_another(tokenization: Tokenization) -> None:
    """If there is nothing else to launch, the pass in flight is completed at once."""
    engine = LaunchingOracle()
    async with running(new_scorer(tokenization, engine), engine) as scorer, asyncio.timeout(5):
        for turn in range(3):
            assert rewards(await scorer.score(request(f"turn {turn}"))) == expected(f"turn {turn}")

    assert engine.max_in_flight == 1


class LosesAReward(LaunchingOracle):
    """A device that omits the last reward of a batch with the bad token."""

    def _compute(self, sequences):
        output = super()._compute(sequences)
        bad = any(BAD in sequence.token_ids for sequence in sequences)
        return type(output)(list(output.rewards)[:-1]) if bad else output


class AnswersNaN(LaunchingOracle):
    """A device that returns NaN for sequences with the bad token."""

    def _compute(self, sequences):
        output = super()._compute(sequences)
        nan = float("nan")
        pairs = zip(sequences, output.rewards, strict=True)
        return type(output)([nan if BAD in sequence.token_ids else reward for sequence, reward in pairs])


FAULTS: dict[str, tuple[Callable[[], LaunchingOracle], type[HttpError] | None]] = {
    "raises-at-launch": (lambda: LaunchingOracle(at_launch=raising(RuntimeError("bug"))), EngineFailed),
    "raises-late": (lambda: LaunchingOracle(on_device=raising(RuntimeError("assert"))), EngineFailed),
    "out-of-memory-at-launch": (
        lambda: LaunchingOracle(at_launch=raising(EngineOutOfMemory("no room"), more_than=1)),
        None,
    ),
    "out-of-memory-late": (lambda: LaunchingOracle(on_device=raising(EngineOutOfMemory("no room"), more_than=1)), None),
    "loses-a-reward": (LosesAReward, OutputMismatch),
    "answers-nan": (AnswersNaN, NonFiniteReward),
}


@pytest.mark.parametrize(("fault", "error"), FAULTS.values(), ids=FAULTS)
async def test_every_item_is_answered_once(
    tokenization: Tokenization, fault: Callable[[], LaunchingOracle], error: type[HttpError] | None
) -> None:
    """With every fault each accepted item has one outcome, and the good ones have their own reward."""
    engine, metrics = fault(), Metrics()
    loads = [[f"{load}-{item}{'#' if load % 3 == 0 else ''}" for item in range(4)] for load in range(24)]
    async with running(new_scorer(tokenization, engine, metrics=metrics), engine) as scorer, asyncio.timeout(30):
        sent = await send(scorer, engine, *loads)
        engine.gate.set()
        scored = await asyncio.gather(*sent)

    num_failed = 0
    for load, one in zip(loads, scored, strict=True):
        for completion, outcome in zip(load, rewards(one), strict=True):
            if isinstance(outcome, float):
                assert [outcome] == expected(completion)
                assert error is None or "#" not in completion
            else:
                assert outcome is error
                num_failed += 1
    assert num_failed >= (0 if error is None else 8 * 4)
    assert engine.max_in_flight <= 2
    counted = sum(
        sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "rm_items_total"
    )
    assert counted == 24 * 4


async def test_budget_is_halved_once_for_batches_of_one_budget(tokenization: Tokenization) -> None:
    """A batch that was taken under the old budget does not halve the new one when it fails too."""
    engine = LaunchingOracle(on_device=raising(EngineOutOfMemory("no room"), more_than=2))
    async with running(new_scorer(tokenization, engine), engine) as scorer:
        sent = await send(scorer, engine, *([f"{load}{item} of many others#" for item in "abcde"] for load in "xy"))
        await until(lambda: engine.max_in_flight == 2)
        engine.gate.set()
        await asyncio.gather(*sent)

        assert scorer.budget.max_tokens == 128


async def test_a_lost_device_with_passes_in_flight_answers_all_requests(tokenization: Tokenization) -> None:
    """A lost device ends the engine thread; requests in flight and in the queue get EngineUnavailable."""
    engine = LaunchingOracle(on_device=raising(EngineUnavailable("cuda:0 is lost")), max_batch_tokens=40)
    scorer = new_scorer(tokenization, engine)
    async with running(scorer, engine), asyncio.timeout(10):
        sent = await send(scorer, engine, *([f"item {index}#"] for index in range(4)))
        await until(lambda: engine.max_in_flight == 2)
        engine.gate.set()
        answers = await asyncio.gather(*sent, return_exceptions=True)

        assert [type(answer) for answer in answers] == [EngineUnavailable] * 4
        assert scorer.state == "failed"


@pytest.mark.parametrize(("drain_s", "answer"), [(10.0, ScoredRequest), (0.0, Draining)], ids=["drained", "no-time"])
async def test_shutdown_answers_what_is_in_flight(tokenization: Tokenization, drain_s: float, answer: type) -> None:
    """A drain waits for the passes in flight; without time for it each caller gets Draining."""
    engine = LaunchingOracle(max_batch_tokens=40)
    scorer = new_scorer(tokenization, engine)
    await scorer.start()
    sent = await send(scorer, engine, *([f"item {index}"] for index in range(4)))
    await until(lambda: engine.max_in_flight == 2)
    threading.Timer(0.2, engine.gate.set).start()
    await scorer.stop(drain_s)

    answers = await asyncio.gather(*sent, return_exceptions=True)
    assert [type(one) for one in answers] == [answer] * 4
    await until(lambda: engine.closed)


async def test_a_deadline_passes_while_its_batch_is_prefetched(tokenization: Tokenization) -> None:
    """A caller whose batch waits on the device is answered at its deadline, and the late reward is dropped."""
    engine = LaunchingOracle(max_batch_tokens=40)
    async with running(new_scorer(tokenization, engine), engine) as scorer:
        engine.gate.clear()
        first = asyncio.create_task(scorer.score(request("first")))
        await until(lambda: engine.max_in_flight == 1)
        with pytest.raises(DeadlineExceeded):
            await scorer.score(request("second", timeout_s=0.05))
        engine.gate.set()

        assert rewards(await first) == expected("first")
        assert rewards(await scorer.score(request("third"))) == expected("third")


async def test_a_device_that_hangs_is_unhealthy(tokenization: Tokenization) -> None:
    """The health check measures the oldest pass in flight, not the one that was launched last."""
    now = [0.0]
    engine = LaunchingOracle(max_batch_tokens=40)
    scorer = new_scorer(tokenization, engine, clock=lambda: now[0])
    async with running(scorer, engine):
        sent = await send(scorer, engine, ["first"], ["second"])
        await until(lambda: engine.max_in_flight == 2)
        scorer.check_health()
        now[0] = 61.0
        with pytest.raises(EngineUnavailable, match="running for more than 60 s"):
            scorer.check_health()
        engine.gate.set()
        await asyncio.gather(*sent)
        scorer.check_health()
