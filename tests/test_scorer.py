"""Every accepted item gets exactly one answer, whatever the engine, the caller or the load does."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import pytest
from reward_client.options import DiagnosticsLevel

from service.engines.base import EngineOutput
from service.engines.oracle import (
    NAN_BYTE,
    RAISE_BYTE,
    OracleEngine,
    OracleFaults,
    byte_tokenizer,
    oracle_reward_of_text,
)
from service.errors import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    EngineOutOfMemory,
    EngineUnavailable,
    HttpError,
    InternalError,
    NonFiniteReward,
    NotReady,
    OutputMismatch,
    Overloaded,
    SequenceTooLong,
    WarmUpFailed,
)
from service.metrics import Metrics
from service.pipeline import Pipeline
from service.records import Encoding, Exchange, Item, Score, ScoreRequest, TokenIds, TokenSequence
from service.request_state import ScoredRequest
from service.scorer import Scorer
from service.settings import BatchingSettings, LimitSettings, TokenizationSettings
from service.tokenization import Tokenization

PROMPT = "How do I boil an egg? "
MAX_INPUT_TOKENS = 256


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    tokenizer = byte_tokenizer(MAX_INPUT_TOKENS)
    return Tokenization(tokenizer, TokenizationSettings(), max_input_tokens=MAX_INPUT_TOKENS, vocab_size=len(tokenizer))


class GatedEngine(OracleEngine):
    """The oracle behind a gate that a test closes to see what waits; records the texts of each batch."""

    def __init__(self, faults: OracleFaults | None = None, max_batch_tokens: int = 256) -> None:
        super().__init__(max_input_tokens=MAX_INPUT_TOKENS, max_batch_tokens=max_batch_tokens, faults=faults)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = False
        self.batches: list[list[str]] = []

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        self.entered.set()
        assert self.gate.wait(timeout=30)
        self.batches.append([bytes(sequence.token_ids).decode() for sequence in sequences])
        return super().forward(sequences)

    def close(self) -> None:
        self.closed = True

    def hold(self) -> None:
        """Let the next pass wait, and forget the batches of the warm-up."""
        self.entered.clear()
        self.gate.clear()
        self.batches.clear()

    async def until_entered(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 10)

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch]


def new_scorer(
    tokenization: Tokenization,
    engine: OracleEngine,
    *,
    limits: LimitSettings | None = None,
    metrics: Metrics | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Scorer:
    return Scorer(
        tokenization,
        Pipeline(engine),
        limits or LimitSettings(),
        BatchingSettings(),
        metrics or Metrics(),
        clock=clock,
    )


@asynccontextmanager
async def running(scorer: Scorer, engine: OracleEngine | None = None) -> AsyncIterator[Scorer]:
    await scorer.start()
    try:
        yield scorer
    finally:
        if isinstance(engine, GatedEngine):
            engine.gate.set()
        await scorer.stop(drain_s=0)


def request(*completions: str, timeout_s: float = 60, level: DiagnosticsLevel = "none") -> ScoreRequest:
    items = tuple(Item(Exchange(PROMPT, completion)) for completion in completions)
    return ScoreRequest(items, Encoding(template="concat"), level, timeout_s)


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


def counted(metrics: Metrics) -> dict[str, float]:
    """Return the items by outcome, as a scrape shows them, without the outcomes that are zero."""
    return {
        sample.labels["outcome"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "rm_items_total" and sample.value
    }


# --- Requests that succeed -------------------------------------------------------------------------------------------


async def test_rewards_are_in_input_order_with_usage_and_timings(tokenization: Tokenization) -> None:
    """A request gets one Score per item, in the order sent, with its tokens counted and its time measured."""
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        scored = await scorer.score(request("zebra", "ant", "mole", level="basic"))

    assert rewards(scored) == expected("zebra", "ant", "mole")
    assert scored.usage.prompt_tokens == 3 * len(PROMPT)
    assert scored.usage.completion_tokens == len("zebraantmole")
    assert scored.usage.scored_tokens == 3 * len(PROMPT) + len("zebraantmole")
    assert scored.usage.shared_tokens == 0
    lengths = [outcome.length for outcome in scored.outcomes if isinstance(outcome, Score)]
    assert [length and length.completion_tokens for length in lengths] == [5, 3, 4]
    assert 0 < scored.timings.engine_s <= scored.timings.total_s
    assert 0 < scored.timings.tokenize_s <= scored.timings.total_s


async def test_large_request_is_answered_completely(tokenization: Tokenization) -> None:
    """The answer to a request of many chunks and many batches is complete and in order."""
    completions = [f"answer {number}" for number in range(200)]
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        scored = await scorer.score(request(*completions))

    assert rewards(scored) == expected(*completions)


async def test_repeated_items_are_computed_once(tokenization: Tokenization) -> None:
    """Equal texts in a request are computed once, and each gets the identical reward."""
    engine = GatedEngine()
    async with running(new_scorer(tokenization, engine)) as scorer:
        engine.batches.clear()
        scored = await scorer.score(request("same", "other", "same", "same"))

    assert rewards(scored) == expected("same", "other", "same", "same")
    assert sorted(engine.texts) == [PROMPT + "other", PROMPT + "same"]
    assert scored.usage.shared_tokens == 2 * len(PROMPT + "same")
    assert scored.usage.scored_tokens == len(PROMPT) * 4 + len("sameothersamesame")


class SharingEngine(GatedEngine):
    """The oracle; it reports that every sequence but the first shared its prompt, with three tokens from the cache."""

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        output = super().forward(sequences, states=states)
        num_sharing = len(sequences) - 1
        return replace(output, shared_tokens=[0, *[len(PROMPT)] * num_sharing], cached_tokens=3 * num_sharing)


async def test_shared_tokens_are_counted_for_their_own_request(tokenization: Tokenization) -> None:
    """In a batch of several requests each has its own count of shared tokens, including repeated items."""
    engine = SharingEngine()
    metrics = Metrics()
    async with running(new_scorer(tokenization, engine, metrics=metrics), engine) as scorer:
        engine.hold()
        first = asyncio.create_task(scorer.score(request("blocks")))
        await engine.until_entered()
        others = [asyncio.create_task(scorer.score(request(*texts))) for texts in (["a", "a", "b"], ["c"])]
        await until(lambda: len(scorer._queue) == 3)
        engine.gate.set()
        usages = [(await task).usage.shared_tokens for task in (first, *others)]

    assert len(engine.batches) == 2
    assert usages[0] == 0
    assert sum(usages[1:]) == 2 * len(PROMPT) + len(PROMPT + "a")
    assert usages[1] >= len(PROMPT) + len(PROMPT + "a")
    counted_tokens = {
        sample.labels["kind"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "rm_tokens_total"
    }
    assert counted_tokens["shared"] == 2 * len(PROMPT)
    assert counted_tokens["cached"] == 2 * 3


class CachingEngine(GatedEngine):
    """The oracle; it reports that all but the last token of every sequence are cached."""

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        return sequence.num_tokens - 1


async def test_cached_tokens_use_no_budget(tokenization: Tokenization) -> None:
    """Tokens that the engine has cached do not count in a batch, so that more requests fit."""
    engine = CachingEngine(max_batch_tokens=MAX_INPUT_TOKENS)
    async with running(new_scorer(tokenization, engine), engine) as scorer:
        engine.hold()
        first = asyncio.create_task(scorer.score(request("blocks")))
        await engine.until_entered()
        others = [asyncio.create_task(scorer.score(request(str(number) * 20))) for number in range(9)]
        await until(lambda: len(scorer._queue) == 9)
        engine.gate.set()
        await asyncio.gather(first, *others)

    assert [len(batch) for batch in engine.batches] == [1, 9]


async def test_equal_ids_keep_their_own_lengths(tokenization: Tokenization) -> None:
    """Token ids and a text with the same ids share a reward, but the prompt length of the text is its own."""
    ids = tuple((PROMPT + "same").encode())
    items = (Item(Exchange(PROMPT, "same")), Item(TokenIds(ids)))
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        scored = await scorer.score(ScoreRequest(items, Encoding(template="concat"), "basic", 60))

    text, bare = [outcome for outcome in scored.outcomes if isinstance(outcome, Score)]
    assert text.reward == bare.reward == expected("same")[0]
    assert text.length is not None
    assert bare.length is not None
    assert (text.length.prompt_tokens, bare.length.prompt_tokens) == (len(PROMPT), None)


async def test_item_that_cannot_be_encoded_fails_alone(tokenization: Tokenization) -> None:
    """An item over the token limit gets its error at its index; the other items get their rewards."""
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        scored = await scorer.score(request("good", "long " * 100, "fine"))
        alone = await scorer.score(request("long " * 100))

    assert rewards(scored) == [expected("good")[0], SequenceTooLong, expected("fine")[0]]
    assert rewards(alone) == [SequenceTooLong]


async def test_mixed_load_loses_and_swaps_nothing(tokenization: Tokenization) -> None:
    """Requests of all sizes at once, some with failing items: each item gets the outcome that belongs to its text."""
    engine = GatedEngine(OracleFaults.by_control_bytes(), max_batch_tokens=2048)
    metrics = Metrics()
    dice = random.Random(0)
    unique = count()

    def completion() -> str:
        fault = dice.choices(["", chr(RAISE_BYTE), chr(NAN_BYTE)], [200, 1, 1])[0]
        return f"{next(unique)} {fault}{'x' * dice.randrange(80)}"

    def outcome_of(text: str) -> float | type[HttpError]:
        if chr(RAISE_BYTE) in text:
            return EngineFailed
        return NonFiniteReward if chr(NAN_BYTE) in text else expected(text)[0]

    loads = [[completion() for _ in range(dice.choice([1, 1, 1, 2, 8, 64]))] for _ in range(300)]
    async with running(new_scorer(tokenization, engine, metrics=metrics)) as scorer:
        answers = await asyncio.gather(*(scorer.score(request(*load)) for load in loads))
        assert (len(scorer._queue), scorer.queued_tokens, len(scorer._queue._requests)) == (0, 0, 0)

    for load, answer in zip(loads, answers, strict=True):
        assert rewards(answer) == [outcome_of(text) for text in load]
    texts = [text for load in loads for text in load]
    assert sum(counted(metrics).values()) == len(texts)
    assert counted(metrics)["ok"] == sum(isinstance(outcome_of(text), float) for text in texts)


# --- Exactly one answer ----------------------------------------------------------------------------------------------


class FaultyEngine(OracleEngine):
    """The oracle with a fault that a test switches on after the warm-up; the subclasses are the faults."""

    def __init__(self) -> None:
        super().__init__(max_input_tokens=MAX_INPUT_TOKENS, max_batch_tokens=1024)
        self.repaired = threading.Event()
        self.repaired.set()

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        output = super().forward(sequences)
        return output if self.repaired.is_set() else self.fail(output)

    def fail(self, output: EngineOutput) -> EngineOutput:
        raise NotImplementedError


class Raises(FaultyEngine):
    def fail(self, output: EngineOutput) -> EngineOutput:
        raise RuntimeError("broken")


class Hangs(FaultyEngine):
    def fail(self, output: EngineOutput) -> EngineOutput:
        assert self.repaired.wait(timeout=30)
        return output


class LosesARow(FaultyEngine):
    def fail(self, output: EngineOutput) -> EngineOutput:
        return EngineOutput(output.rewards[:-1])


class AnswersNaN(FaultyEngine):
    def fail(self, output: EngineOutput) -> EngineOutput:
        return EngineOutput([float("nan")] * len(output.rewards))


class RunsOutOfMemory(FaultyEngine):
    def fail(self, output: EngineOutput) -> EngineOutput:
        if len(output.rewards) > 1:
            raise EngineOutOfMemory("no room")
        return output


class Dies(FaultyEngine):
    def fail(self, output: EngineOutput) -> EngineOutput:
        raise SystemExit


FAULTS: dict[str, tuple[type[FaultyEngine], type[HttpError] | None]] = {
    "engine-raises": (Raises, EngineFailed),
    "engine-hangs": (Hangs, DeadlineExceeded),
    "engine-loses-a-row": (LosesARow, OutputMismatch),
    "engine-answers-nan": (AnswersNaN, NonFiniteReward),
    "engine-runs-out-of-memory": (RunsOutOfMemory, None),
    "engine-dies": (Dies, EngineUnavailable),
}


@pytest.mark.parametrize(("fault", "error"), FAULTS.values(), ids=FAULTS)
async def test_each_accepted_request_gets_one_answer_and_the_next_batch_is_served(
    tokenization: Tokenization, fault: type[FaultyEngine], error: type[HttpError] | None
) -> None:
    """With every fault all waiting callers are answered, with their rewards or with the error that names the fault."""
    engine = fault()
    metrics = Metrics()
    scorer = new_scorer(tokenization, engine, metrics=metrics)
    loads = [[f"{load}-{item}" for item in range(3)] for load in range(8)]
    timeout_s = 0.2 if fault is Hangs else 60

    async with running(scorer), asyncio.timeout(20):
        engine.repaired.clear()
        answers = await asyncio.gather(
            *(scorer.score(request(*load, timeout_s=timeout_s)) for load in loads), return_exceptions=True
        )
        engine.repaired.set()
        after = await asyncio.gather(scorer.score(request("after")), return_exceptions=True)

    for load, answer in zip(loads, answers, strict=True):
        if isinstance(answer, ScoredRequest):
            assert rewards(answer) == (expected(*load) if error is None else [error] * 3)
        else:
            assert type(answer) is error
    if fault is Dies:
        assert type(after[0]) is EngineUnavailable
    else:
        assert isinstance(after[0], ScoredRequest)
        assert rewards(after[0]) == expected("after")
    assert sum(counted(metrics).values()) == 25


@pytest.mark.parametrize("step", ["start", "finish"])
async def test_bug_outside_the_engine_fails_its_batch_only(
    tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """An exception in the pipeline itself answers its batch with InternalError, and the thread continues."""
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, step, lambda *_: 1 / 0)
            broken = await scorer.score(request("one", "two"))
        healthy = await scorer.score(request("three"))

    assert rewards(broken) == [InternalError, InternalError]
    assert rewards(healthy) == expected("three")


# --- Fairness, disconnects, deadlines --------------------------------------------------------------------------------


async def test_single_item_overtakes_a_bulk_request(tokenization: Tokenization) -> None:
    """While a large request is being computed, a new request of one item is in the next batch."""
    engine = GatedEngine()
    async with running(new_scorer(tokenization, engine), engine) as scorer:
        engine.hold()
        bulk = asyncio.create_task(scorer.score(request(*(f"bulk {number:03}" for number in range(200)))))
        await engine.until_entered()
        small = asyncio.create_task(scorer.score(request("small")))
        await until(lambda: len(scorer._queue._requests) == 2)
        engine.gate.set()
        await asyncio.gather(bulk, small)

    assert any("small" in text for text in engine.batches[1])


async def test_items_of_a_disconnected_client_are_not_computed(tokenization: Tokenization) -> None:
    """What a disconnected client has waiting is dropped at once, and others are served."""
    engine = GatedEngine()
    metrics = Metrics()
    async with running(new_scorer(tokenization, engine, metrics=metrics), engine) as scorer:
        engine.hold()
        first = asyncio.create_task(scorer.score(request("first")))
        await engine.until_entered()
        gone = asyncio.create_task(scorer.score(request(*(f"gone {number}" for number in range(50)))))
        await until(lambda: len(scorer._queue) == 50)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert scorer.queued_tokens == 0
        engine.gate.set()
        assert rewards(await first) == expected("first")
        assert rewards(await scorer.score(request("next"))) == expected("next")

    assert engine.texts == [PROMPT + "first", PROMPT + "next"]
    assert counted(metrics) == {"ok": 2, "cancelled": 50}


async def test_deadline_is_answered_promptly_and_its_items_are_not_computed(tokenization: Tokenization) -> None:
    """A caller gets the error at its deadline though the engine is busy, and its items are not computed."""
    engine = GatedEngine()
    metrics = Metrics()
    async with running(new_scorer(tokenization, engine, metrics=metrics), engine) as scorer:
        engine.hold()
        first = asyncio.create_task(scorer.score(request("first")))
        await engine.until_entered()
        with pytest.raises(DeadlineExceeded):
            await scorer.score(request("late", "too late", timeout_s=0.05))
        assert scorer.queued_tokens == 0
        engine.gate.set()
        await first

    assert engine.texts == [PROMPT + "first"]
    assert counted(metrics) == {"ok": 1, "expired": 2}


async def test_deadline_is_never_longer_than_the_limit(tokenization: Tokenization) -> None:
    """A request with a timeout above the service's limit gets the limit."""
    engine = GatedEngine()
    scorer = new_scorer(tokenization, engine, limits=LimitSettings(deadline_s=0.05))
    async with running(scorer, engine):
        engine.hold()
        with pytest.raises(DeadlineExceeded):
            await scorer.score(request("late", timeout_s=3600))


# --- Overload --------------------------------------------------------------------------------------------------------


async def test_full_queue_refuses_before_tokenizing(
    tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused request is not tokenized, its error has a time to retry, and the waiting requests are not affected."""
    engine = GatedEngine()
    metrics = Metrics()
    scorer = new_scorer(tokenization, engine, limits=LimitSettings(max_queue_tokens=100), metrics=metrics)
    async with running(scorer, engine):
        engine.hold()
        first = asyncio.create_task(scorer.score(request("first")))
        await engine.until_entered()
        accepted = asyncio.create_task(scorer.score(request(*(f"accepted {number}" for number in range(20)))))
        await until(lambda: len(scorer._queue) == 20)
        with monkeypatch.context() as patch:
            patch.setattr(tokenization, "encode", lambda *_: pytest.fail("a refused request was tokenized"))
            with pytest.raises(Overloaded) as refusal:
                await scorer.score(request("refused", "refused too"))
        engine.gate.set()
        await asyncio.gather(first, accepted)

    assert refusal.value.retry_after_s > 0
    assert counted(metrics) == {"ok": 21, "shed": 2}


async def test_request_that_waits_for_room(tokenization: Tokenization) -> None:
    """Where the queue is full, such a request is scored once there is room, and nothing counts it as refused."""
    engine = GatedEngine()
    metrics = Metrics()
    scorer = new_scorer(tokenization, engine, limits=LimitSettings(max_queue_tokens=100), metrics=metrics)
    async with running(scorer, engine):
        accepted = await fill_queue(scorer, engine)
        patient = replace(request("patient"), waits_for_room=True)
        waiting = asyncio.create_task(scorer.score(patient))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        engine.gate.set()
        scored = await waiting
        await asyncio.gather(*accepted)

    assert isinstance(scored.outcomes[0], Score)
    assert counted(metrics) == {"ok": 22}


async def test_waiting_for_room_is_limited(tokenization: Tokenization) -> None:
    """It ends with the refusal at the deadline, at once where as many tokens wait already, and when the client goes."""
    engine = GatedEngine()
    metrics = Metrics()
    scorer = new_scorer(tokenization, engine, limits=LimitSettings(max_queue_tokens=100), metrics=metrics)
    async with running(scorer, engine):
        accepted = await fill_queue(scorer, engine)
        patient = replace(request(*"0123"), waits_for_room=True)
        with pytest.raises(Overloaded):
            await scorer.score(replace(patient, timeout_s=0.02))
        waiting = asyncio.create_task(scorer.score(patient))
        await asyncio.sleep(0.01)
        with pytest.raises(Overloaded):
            await asyncio.wait_for(scorer.score(patient), 1.0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert scorer._admission._num_patient_tokens == 0
        engine.gate.set()
        await asyncio.gather(*accepted)

    assert counted(metrics) == {"ok": 21, "shed": 8, "cancelled": 4}


async def fill_queue(scorer: Scorer, engine: GatedEngine) -> list[asyncio.Task[ScoredRequest]]:
    """Let the engine wait in a pass, and fill the queue behind it."""
    engine.hold()
    first = asyncio.create_task(scorer.score(request("first")))
    await engine.until_entered()
    rest = asyncio.create_task(scorer.score(request(*(f"accepted {number}" for number in range(20)))))
    await until(lambda: len(scorer._queue) == 20)
    return [first, rest]


# --- Life cycle ------------------------------------------------------------------------------------------------------


async def test_nothing_is_accepted_before_the_warm_up(tokenization: Tokenization) -> None:
    """A scorer that was not started refuses with NotReady; once started it is ready, also in its metrics."""
    metrics = Metrics()
    scorer = new_scorer(tokenization, GatedEngine(), metrics=metrics)

    with pytest.raises(NotReady):
        await scorer.score(request("early"))
    async with running(scorer):
        assert scorer.state == "ready"
        assert scorer.is_engine_alive
        assert metrics.registry.get_sample_value("rm_ready") == 1
    assert metrics.registry.get_sample_value("rm_ready") == 0


async def test_failed_warm_up_ends_the_start(tokenization: Tokenization) -> None:
    """An engine without memory for one sequence of the maximal length raises at start, and the scorer is not ready."""
    scorer = new_scorer(tokenization, GatedEngine(OracleFaults(memory_tokens=10)))

    with pytest.raises(WarmUpFailed, match="no memory"):
        await scorer.start()
    with pytest.raises(EngineUnavailable):
        scorer.check_health()
    await scorer.stop(drain_s=0)


async def test_accepted_requests_are_answered_while_draining(tokenization: Tokenization) -> None:
    """Stopping with a full queue answers all accepted requests, refuses later ones, and closes the engine."""
    engine = GatedEngine()
    scorer = new_scorer(tokenization, engine)
    async with running(scorer, engine):
        engine.hold()
        first = asyncio.create_task(scorer.score(request("accepted 0")))
        await engine.until_entered()
        others = [asyncio.create_task(scorer.score(request(f"accepted {number}"))) for number in range(1, 30)]
        await until(lambda: len(scorer._queue) == 29)
        stopping = asyncio.create_task(scorer.stop(drain_s=30))
        await until(lambda: scorer.state == "draining")
        with pytest.raises(Draining):
            await scorer.score(request("late"))
        engine.gate.set()
        answers = await asyncio.gather(first, *others)
        await stopping

    assert [rewards(answer) for answer in answers] == [expected(f"accepted {number}") for number in range(30)]
    assert engine.closed
    assert not scorer.is_engine_alive


async def test_stop_answers_the_requests_that_are_left(
    tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the drain time is over and the engine hangs, the remaining callers get Draining, and stop returns."""
    monkeypatch.setattr("service.scorer.ENGINE_STOP_S", 0.05)
    engine = GatedEngine()
    scorer = new_scorer(tokenization, engine)
    async with running(scorer, engine):
        engine.hold()
        left = [asyncio.create_task(scorer.score(request(f"left {number}"))) for number in range(5)]
        await engine.until_entered()
        await scorer.stop(drain_s=0.01)
        answers = await asyncio.gather(*left, return_exceptions=True)

    assert {type(answer) for answer in answers} == {Draining}


async def test_dead_engine_is_reported(tokenization: Tokenization) -> None:
    """Once the engine thread has died, the health check fails and the state is ``failed``."""
    engine = Dies()
    scorer = new_scorer(tokenization, engine)
    async with running(scorer):
        scorer.check_health()
        engine.repaired.clear()
        with pytest.raises(EngineUnavailable):
            await scorer.score(request("one"))

        assert scorer.state == "failed"
        with pytest.raises(EngineUnavailable):
            scorer.check_health()


async def test_stuck_engine_is_reported(tokenization: Tokenization) -> None:
    """The health check fails while a batch runs for longer than any caller may wait."""
    now = [0.0]
    engine = GatedEngine()
    scorer = new_scorer(tokenization, engine, limits=LimitSettings(deadline_s=60), clock=lambda: now[0])
    async with running(scorer, engine):
        engine.hold()
        task = asyncio.create_task(scorer.score(request("one")))
        await engine.until_entered()
        now[0] = 59.0
        scorer.check_health()
        now[0] = 61.0
        with pytest.raises(EngineUnavailable):
            scorer.check_health()
        now[0] = 1.0
        engine.gate.set()
        await task
        now[0] = 1000.0
        scorer.check_health()


async def test_out_of_memory_shrinks_the_budget(tokenization: Tokenization) -> None:
    """After a batch that did not fit the next ones are smaller, everything is answered, and the metrics count it."""
    engine = GatedEngine(max_batch_tokens=4096)
    metrics = Metrics()
    completions = [f"answer {number}" for number in range(60)]
    async with running(new_scorer(tokenization, engine, metrics=metrics), engine) as scorer:
        engine._faults = OracleFaults(memory_tokens=600)
        scored = await scorer.score(request(*completions))
        budget = scorer.budget.max_tokens

    assert rewards(scored) == expected(*completions)
    assert budget < 4096
    assert metrics.registry.get_sample_value("rm_budget_tokens") == budget
    assert metrics.registry.get_sample_value("rm_oom_total") == len(bin(4096 // budget)) - 3


async def test_metrics_show_what_waits(tokenization: Tokenization) -> None:
    """The gauges of the queue show its items, tokens and oldest wait, and return to zero."""
    now = [5.0]
    engine = GatedEngine()
    metrics = Metrics()
    value = metrics.registry.get_sample_value
    async with running(new_scorer(tokenization, engine, metrics=metrics, clock=lambda: now[0]), engine) as scorer:
        engine.hold()
        first = asyncio.create_task(scorer.score(request("first")))
        await engine.until_entered()
        second = asyncio.create_task(scorer.score(request("one", "two")))
        await until(lambda: len(scorer._queue) == 2)
        now[0] = 8.0

        assert (value("rm_queue_items"), value("rm_queue_tokens")) == (2, 2 * len(PROMPT) + 6)
        assert value("rm_queue_oldest_seconds") == 3
        assert value("rm_inflight_items") == 3
        engine.gate.set()
        await asyncio.gather(first, second)

    assert (value("rm_queue_items"), value("rm_queue_oldest_seconds"), value("rm_inflight_items")) == (0, 0, 0)
    assert value("rm_tokens_total", {"kind": "real"}) == 3 * len(PROMPT) + len("firstonetwo")
    assert value("rm_batch_items_sum") == 3
