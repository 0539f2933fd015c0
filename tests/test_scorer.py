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
from service.scorer import CHUNK_CHARS, ScoredRequest, Scorer, chunks_of, plan_work
from service.settings import BatchingSettings, LimitSettings, TokenizationSettings
from service.tokenization import Tokenization

PROMPT = "How do I boil an egg? "
MAX_INPUT_TOKENS = 256


@pytest.fixture(scope="module")
def tokenization() -> Tokenization:
    tokenizer = byte_tokenizer(MAX_INPUT_TOKENS)
    return Tokenization(tokenizer, TokenizationSettings(), max_input_tokens=MAX_INPUT_TOKENS, vocab_size=len(tokenizer))


class GatedEngine(OracleEngine):
    """The oracle behind a gate that a test closes to see what waits; remembers the texts of each batch."""

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
        """Let the next pass wait; forget what warmed us up."""
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


def rewards(scored: ScoredRequest) -> list[float | type[HttpError]]:
    return [outcome.reward if isinstance(outcome, Score) else type(outcome) for outcome in scored.outcomes]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(5000):
        if condition():
            return
        await asyncio.sleep(0.001)
    pytest.fail("what the test waits for did not come")


def counted(metrics: Metrics) -> dict[str, float]:
    """Items by outcome, as a scrape shows them; outcomes that nothing had are left out."""
    return {
        sample.labels["outcome"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "rm_items_total" and sample.value
    }


# --- The ordinary road -----------------------------------------------------------------------------------------------


async def test_rewards_come_in_input_order_with_what_they_took(tokenization: Tokenization) -> None:
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


async def test_large_request_is_answered_whole(tokenization: Tokenization) -> None:
    """A request of many chunks and many batches comes back complete and in order."""
    completions = [f"answer {number}" for number in range(200)]
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        scored = await scorer.score(request(*completions))

    assert rewards(scored) == expected(*completions)


async def test_repeated_items_are_computed_once(tokenization: Tokenization) -> None:
    """Equal texts in a request take one computation, and each gets the very same reward."""
    engine = GatedEngine()
    async with running(new_scorer(tokenization, engine)) as scorer:
        engine.batches.clear()
        scored = await scorer.score(request("same", "other", "same", "same"))

    assert rewards(scored) == expected("same", "other", "same", "same")
    assert sorted(engine.texts) == [PROMPT + "other", PROMPT + "same"]
    assert scored.usage.shared_tokens == 2 * len(PROMPT + "same")
    assert scored.usage.scored_tokens == len(PROMPT) * 4 + len("sameothersamesame")


class SharingEngine(GatedEngine):
    """The oracle, which says of every sequence but the first that it shared the prompt, three tokens of it kept."""

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        output = super().forward(sequences, states=states)
        num_sharing = len(sequences) - 1
        return replace(output, shared_tokens=[0, *[len(PROMPT)] * num_sharing], cached_tokens=3 * num_sharing)


async def test_shared_tokens_are_counted_for_whom_they_were_saved(tokenization: Tokenization) -> None:
    """In a batch of several requests each is told what was not computed for it, repeated items included."""
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


class RememberingEngine(GatedEngine):
    """The oracle, which says that it has kept all but the last token of everything."""

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        return sequence.num_tokens - 1


async def test_kept_prompts_travel_together(tokenization: Tokenization) -> None:
    """What the engine has kept takes no room in a batch, so that more requests leave in one."""
    engine = RememberingEngine(max_batch_tokens=MAX_INPUT_TOKENS)
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
    """Token ids and a text that reads the same share a reward, but only the text knows its prompt."""
    ids = tuple((PROMPT + "same").encode())
    items = (Item(Exchange(PROMPT, "same")), Item(TokenIds(ids)))
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        scored = await scorer.score(ScoreRequest(items, Encoding(template="concat"), "basic", 60))

    text, bare = [outcome for outcome in scored.outcomes if isinstance(outcome, Score)]
    assert text.reward == bare.reward == expected("same")[0]
    assert text.length is not None
    assert bare.length is not None
    assert (text.length.prompt_tokens, bare.length.prompt_tokens) == (len(PROMPT), None)


async def test_item_that_cannot_be_encoded_fails_in_its_place(tokenization: Tokenization) -> None:
    """An item over the token limit has its error where it stands; its neighbours have their rewards."""
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        scored = await scorer.score(request("good", "long " * 100, "fine"))
        alone = await scorer.score(request("long " * 100))

    assert rewards(scored) == [expected("good")[0], SequenceTooLong, expected("fine")[0]]
    assert rewards(alone) == [SequenceTooLong]


async def test_mixed_load_loses_and_swaps_nothing(tokenization: Tokenization) -> None:
    """Requests of all sizes at once, poison and NaN among them: each item has the answer that its text deserves."""
    engine = GatedEngine(OracleFaults.by_control_bytes(), max_batch_tokens=2048)
    metrics = Metrics()
    dice = random.Random(0)
    unique = count()

    def completion() -> str:
        fault = dice.choices(["", chr(RAISE_BYTE), chr(NAN_BYTE)], [200, 1, 1])[0]
        return f"{next(unique)} {fault}{'x' * dice.randrange(80)}"

    def deserved(text: str) -> float | type[HttpError]:
        if chr(RAISE_BYTE) in text:
            return EngineFailed
        return NonFiniteReward if chr(NAN_BYTE) in text else expected(text)[0]

    loads = [[completion() for _ in range(dice.choice([1, 1, 1, 2, 8, 64]))] for _ in range(300)]
    async with running(new_scorer(tokenization, engine, metrics=metrics)) as scorer:
        answers = await asyncio.gather(*(scorer.score(request(*load)) for load in loads))
        assert (len(scorer._queue), scorer.queued_tokens, len(scorer._pending)) == (0, 0, 0)

    for load, answer in zip(loads, answers, strict=True):
        assert rewards(answer) == [deserved(text) for text in load]
    texts = [text for load in loads for text in load]
    assert sum(counted(metrics).values()) == len(texts)
    assert counted(metrics)["ok"] == sum(isinstance(deserved(text), float) for text in texts)


# --- The law ---------------------------------------------------------------------------------------------------------


class SickEngine(OracleEngine):
    """The oracle with an illness that a test cures; the subclasses are the illnesses. Healthy while it is warmed up."""

    def __init__(self) -> None:
        super().__init__(max_input_tokens=MAX_INPUT_TOKENS, max_batch_tokens=1024)
        self.cured = threading.Event()
        self.cured.set()

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        output = super().forward(sequences)
        return output if self.cured.is_set() else self.sicken(output)

    def sicken(self, output: EngineOutput) -> EngineOutput:
        raise NotImplementedError


class Raises(SickEngine):
    def sicken(self, output: EngineOutput) -> EngineOutput:
        raise RuntimeError("broken")


class Hangs(SickEngine):
    def sicken(self, output: EngineOutput) -> EngineOutput:
        assert self.cured.wait(timeout=30)
        return output


class LosesARow(SickEngine):
    def sicken(self, output: EngineOutput) -> EngineOutput:
        return EngineOutput(output.rewards[:-1])


class AnswersNaN(SickEngine):
    def sicken(self, output: EngineOutput) -> EngineOutput:
        return EngineOutput([float("nan")] * len(output.rewards))


class RunsOutOfMemory(SickEngine):
    def sicken(self, output: EngineOutput) -> EngineOutput:
        if len(output.rewards) > 1:
            raise EngineOutOfMemory("no room")
        return output


class Dies(SickEngine):
    def sicken(self, output: EngineOutput) -> EngineOutput:
        raise SystemExit


WORLDS: dict[str, tuple[type[SickEngine], type[HttpError] | None]] = {
    "engine-raises": (Raises, EngineFailed),
    "engine-hangs": (Hangs, DeadlineExceeded),
    "engine-loses-a-row": (LosesARow, OutputMismatch),
    "engine-answers-nan": (AnswersNaN, NonFiniteReward),
    "engine-runs-out-of-memory": (RunsOutOfMemory, None),
    "engine-dies": (Dies, EngineUnavailable),
}


@pytest.mark.parametrize(("world", "error"), WORLDS.values(), ids=WORLDS)
async def test_each_accepted_request_gets_one_answer_and_the_next_batch_is_served(
    tokenization: Tokenization, world: type[SickEngine], error: type[HttpError] | None
) -> None:
    """In every bad world all waiting callers are answered, rightly or with the error that names what happened."""
    engine = world()
    metrics = Metrics()
    scorer = new_scorer(tokenization, engine, metrics=metrics)
    loads = [[f"{load}-{item}" for item in range(3)] for load in range(8)]
    timeout_s = 0.2 if world is Hangs else 60

    async with running(scorer), asyncio.timeout(20):
        engine.cured.clear()
        answers = await asyncio.gather(
            *(scorer.score(request(*load, timeout_s=timeout_s)) for load in loads), return_exceptions=True
        )
        engine.cured.set()
        after = await asyncio.gather(scorer.score(request("after")), return_exceptions=True)

    for load, answer in zip(loads, answers, strict=True):
        if isinstance(answer, ScoredRequest):
            assert rewards(answer) == (expected(*load) if error is None else [error] * 3)
        else:
            assert type(answer) is error
    if world is Dies:
        assert type(after[0]) is EngineUnavailable
    else:
        assert isinstance(after[0], ScoredRequest)
        assert rewards(after[0]) == expected("after")
    assert sum(counted(metrics).values()) == 25


@pytest.mark.parametrize("step", ["start", "finish"])
async def test_bug_outside_the_engine_fails_its_batch_only(
    tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """An exception in our own code answers its batch with InternalError, and the thread goes on."""
    async with running(new_scorer(tokenization, GatedEngine())) as scorer:
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, step, lambda *_: 1 / 0)
            broken = await scorer.score(request("one", "two"))
        healthy = await scorer.score(request("three"))

    assert rewards(broken) == [InternalError, InternalError]
    assert rewards(healthy) == expected("three")


# --- Fairness, leaving, deadlines ------------------------------------------------------------------------------------


async def test_single_item_overtakes_a_bulk_request(tokenization: Tokenization) -> None:
    """While a large request is being computed, a newcomer of one item is in the next batch."""
    engine = GatedEngine()
    async with running(new_scorer(tokenization, engine), engine) as scorer:
        engine.hold()
        bulk = asyncio.create_task(scorer.score(request(*(f"bulk {number:03}" for number in range(200)))))
        await engine.until_entered()
        small = asyncio.create_task(scorer.score(request("small")))
        waiting = scorer.queued_tokens
        await until(lambda: scorer.queued_tokens > waiting and not scorer._queue._reserved)
        engine.gate.set()
        await asyncio.gather(bulk, small)

    assert any("small" in text for text in engine.batches[1])


async def test_caller_who_leaves_costs_no_compute(tokenization: Tokenization) -> None:
    """What a gone client has waiting is dropped, its room is free at once, and others are served."""
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
    """A caller hears of the deadline while the engine is still busy with others, and none of it is computed."""
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
    """A request that asks for more time than the service gives anyone gets the service's limit."""
    engine = GatedEngine()
    scorer = new_scorer(tokenization, engine, limits=LimitSettings(deadline_s=0.05))
    async with running(scorer, engine):
        engine.hold()
        with pytest.raises(DeadlineExceeded):
            await scorer.score(request("late", timeout_s=3600))


# --- Overload --------------------------------------------------------------------------------------------------------


async def test_full_line_refuses_before_tokenizing(tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused request costs no tokenizing, says when to come back, and leaves those in the line alone."""
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


# --- Life ------------------------------------------------------------------------------------------------------------


async def test_nothing_is_taken_before_the_engine_is_warm(tokenization: Tokenization) -> None:
    """A scorer that was not started refuses with NotReady; once started it is ready and says so in its metrics."""
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
    """An engine without room for one longest sequence raises at start, and the scorer is not ready."""
    scorer = new_scorer(tokenization, GatedEngine(OracleFaults(memory_tokens=10)))

    with pytest.raises(WarmUpFailed, match="no room"):
        await scorer.start()
    with pytest.raises(EngineUnavailable):
        scorer.check_health()
    await scorer.stop(drain_s=0)


async def test_accepted_requests_are_answered_while_draining(tokenization: Tokenization) -> None:
    """Stopping with a full queue answers all that was accepted, refuses what comes later, and frees the engine."""
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


async def test_stop_answers_those_it_cannot_wait_for(
    tokenization: Tokenization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the drain time is over and the engine hangs, the callers left get Draining, and stop returns."""
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
    """Once the engine thread has died, health fails and the state says so, that the replica may be replaced."""
    engine = Dies()
    scorer = new_scorer(tokenization, engine)
    async with running(scorer):
        scorer.check_health()
        engine.cured.clear()
        with pytest.raises(EngineUnavailable):
            await scorer.score(request("one"))

        assert scorer.state == "failed"
        with pytest.raises(EngineUnavailable):
            scorer.check_health()


async def test_stuck_engine_is_reported(tokenization: Tokenization) -> None:
    """A batch that runs for longer than any caller may wait is a reason to replace the replica."""
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
    """After a batch that did not fit the next ones are smaller, everyone is answered, and the metrics tell."""
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


async def test_metrics_tell_what_waits(tokenization: Tokenization) -> None:
    """The gauges of the queue show its items, tokens and age, and fall back to zero."""
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


# --- Planning --------------------------------------------------------------------------------------------------------


ITEMS = [Item(Exchange(prompt, completion)) for prompt in ("p", "q") for completion in ("a", "b", "a")]


@pytest.mark.parametrize("length", [0, 10, 3000, 2 * CHUNK_CHARS])
def test_chunks_hold_all_items_in_order(length: int) -> None:
    """A request is cut into pieces of bounded work, without losing or moving an item."""
    items = [Item(Exchange("p", f"{number}" + "x" * length)) for number in range(150)]

    chunks = list(chunks_of(items))

    assert [item for chunk in chunks for item in chunk] == items
    assert len(chunks) > 1
    assert all(sum(item.content.num_chars for item in chunk[:-1]) < CHUNK_CHARS for chunk in chunks)


def test_plan_keeps_prompts_together_and_each_sequence_once() -> None:
    """Work holds each distinct sequence once, with all its places, and one key per prompt."""
    encoded = [TokenSequence((ord(prompt), ord(answer)), num_prompt_tokens=1) for prompt in "pq" for answer in "aba"]

    work = plan_work(ITEMS, encoded)

    assert [sequence.token_ids for sequence in work.sequences] == [
        (ord(prompt), ord(answer)) for prompt in "pq" for answer in "ab"
    ]
    assert work.places == ((0, 2), (1,), (3, 5), (4,))
    assert work.prefixes[0] == work.prefixes[1] != work.prefixes[2] == work.prefixes[3]


def test_plan_leaves_errors_out() -> None:
    """An item that was not encoded asks nothing of the engine."""
    encoded = [SequenceTooLong("too long")] * 5 + [TokenSequence((1, 2))]

    assert plan_work(ITEMS, encoded).places == ((5,),)
