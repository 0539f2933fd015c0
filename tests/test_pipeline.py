"""A batch gets one outcome per sequence, in order, whatever the engine does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_client.options import DiagnosticsLevel

from service.batch_run import isolate_failures
from service.engines.base import EngineOutput
from service.engines.oracle import OracleEngine, OracleFaults, oracle_reward
from service.errors import EngineFailed, EngineOutOfMemory, HttpError, NonFiniteReward, OutputMismatch, WarmUpFailed
from service.host_memory import ProcessMemory
from service.pipeline import Pipeline
from service.records import Score, TokenSequence
from service.scheduling.budget import BatchBudget
from service.warm_up import warm_up

RAISES, NAN, INFINITY = 1, 2, 3


class ScriptedEngine(OracleEngine):
    """The oracle with a function of the test that changes its rewards; records the batches."""

    def __init__(
        self,
        script: Callable[[Sequence[TokenSequence], list[float]], list[float]] = lambda _, rewards: rewards,
        *,
        max_input_tokens: int = 64,
        faults: OracleFaults | None = None,
    ) -> None:
        super().__init__(max_input_tokens=max_input_tokens, faults=faults)
        self._script = script
        self.batches: list[list[TokenSequence]] = []

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        self.batches.append(list(sequences))
        rewards = self._script(sequences, list(super().forward(sequences).rewards))
        return EngineOutput(rewards, shared_tokens=[1] * len(sequences))


def distinct(count: int, length: int = 4) -> list[TokenSequence]:
    return [TokenSequence((100 + index, *range(100, 99 + length))) for index in range(count)]


def levels(sequences: Sequence[TokenSequence], level: DiagnosticsLevel = "none") -> list[DiagnosticsLevel]:
    return [level] * len(sequences)


def expected(sequence: TokenSequence) -> Score:
    return Score(oracle_reward(sequence.token_ids))


def test_rewards_are_in_the_order_of_the_sequences() -> None:
    """A batch that succeeds takes one pass and gives each sequence its own reward."""
    sequences = distinct(16)

    outcome = Pipeline(ScriptedEngine()).run(sequences, levels(sequences))

    assert list(outcome.outcomes) == [expected(sequence) for sequence in sequences]
    assert (outcome.num_forwards, outcome.out_of_memory, outcome.shared_tokens) == (1, False, (1,) * 16)


def test_states_are_read_only_where_they_are_needed() -> None:
    """Without a calibration no level reads states, and no level changes the reward."""
    sequences = [TokenSequence((5, 6, 7), num_prompt_tokens=2)] * 3
    engine = ScriptedEngine()

    outcome = Pipeline(engine).run(sequences, ["none", "basic", "full"])

    none, basic, full = [score for score in outcome.outcomes if isinstance(score, Score)]
    assert none == basic == full
    assert none.traits is None


@pytest.mark.parametrize("position", [0, 77, 255])
def test_one_failing_sequence_in_256_fails_alone(position: int) -> None:
    """255 sequences get their rewards, one its error, in at most 17 passes."""
    sequences = distinct(256)
    sequences[position] = TokenSequence((RAISES, 3))
    engine = ScriptedEngine(faults=OracleFaults(raise_on=RAISES))

    outcome = Pipeline(engine).run(sequences, levels(sequences))

    assert type(outcome.outcomes[position]) is EngineFailed
    assert all(
        got == expected(sequence)
        for index, (got, sequence) in enumerate(zip(outcome.outcomes, sequences, strict=True))
        if index != position
    )
    assert outcome.num_forwards == len(engine.batches) <= 17


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from(["good", "raises", "nan", "infinity"]), min_size=1, max_size=24))
def test_every_sequence_gets_its_own_outcome(kinds: list[str]) -> None:
    """In any mix of failing and good sequences the outcome of one does not depend on the others."""
    first_id = {"good": 9, "raises": RAISES, "nan": NAN, "infinity": INFINITY}
    sequences = [TokenSequence((first_id[kind], 100 + index)) for index, kind in enumerate(kinds)]
    engine = ScriptedEngine(faults=OracleFaults(raise_on=RAISES, nan_on=NAN, infinity_on=INFINITY))

    outcomes = Pipeline(engine).run(sequences, levels(sequences)).outcomes

    for kind, sequence, outcome in zip(kinds, sequences, outcomes, strict=True):
        if kind == "good":
            assert outcome == expected(sequence)
        else:
            assert type(outcome) is (EngineFailed if kind == "raises" else NonFiniteReward)


def test_out_of_memory_halves_the_batch() -> None:
    """A batch that does not fit is computed in parts that do, and the outcome records it."""
    sequences = distinct(8, length=4)

    outcome = Pipeline(ScriptedEngine(faults=OracleFaults(memory_tokens=10))).run(sequences, levels(sequences))

    assert list(outcome.outcomes) == [expected(sequence) for sequence in sequences]
    assert outcome.out_of_memory


def test_sequence_that_does_not_fit_even_alone_fails_alone() -> None:
    """If one sequence is too long for the device, the others still get their rewards."""
    sequences = [*distinct(3, length=4), TokenSequence(tuple(range(200, 220)))]

    outcome = Pipeline(ScriptedEngine(faults=OracleFaults(memory_tokens=10))).run(sequences, levels(sequences))

    assert [type(entry) for entry in outcome.outcomes] == [Score, Score, Score, EngineOutOfMemory]


@pytest.mark.parametrize(
    "script",
    [lambda _, rewards: rewards[:-1], lambda _, rewards: [*rewards, 0.0], lambda *_: []],
    ids=["one-too-few", "one-too-many", "empty"],
)
def test_no_reward_is_used_if_their_number_is_wrong(
    script: Callable[[Sequence[TokenSequence], list[float]], list[float]],
) -> None:
    """If the number of rewards is wrong none is used, because it may belong to another sequence."""
    sequences = distinct(4)

    outcome = Pipeline(ScriptedEngine(script)).run(sequences, levels(sequences))

    assert all(type(entry) is OutputMismatch for entry in outcome.outcomes)


def test_exit_is_not_caught() -> None:
    """What is not an error of the pass (an exit, an interrupt) is raised to the owner of the thread."""

    def exit_(*_: object) -> list[float]:
        raise SystemExit

    with pytest.raises(SystemExit):
        Pipeline(ScriptedEngine(exit_)).run(distinct(2), levels(distinct(2)))


def test_failed_pass_is_logged_without_ids(caplog: pytest.LogCaptureFixture) -> None:
    """The log has the number of sequences that failed, and none of their ids."""
    with caplog.at_level(logging.WARNING):
        Pipeline(ScriptedEngine(faults=OracleFaults(raise_on=RAISES))).run([TokenSequence((RAISES, 98765))], ["none"])

    assert "1 of 1 sequences cannot be scored" in caplog.text
    assert "98765" not in caplog.text


def test_failed_pass_is_logged_once_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    """Bisection of a failing batch logs one traceback, not one for each of its passes."""
    sequences = [*distinct(63), TokenSequence((RAISES,))]
    with caplog.at_level(logging.WARNING):
        Pipeline(ScriptedEngine(faults=OracleFaults(raise_on=RAISES))).run(sequences, levels(sequences))

    assert caplog.text.count("Traceback") == 1


def test_errors_hold_no_reference_to_the_pass() -> None:
    """An error in an outcome holds no traceback, whose frames would hold the tensors of the failed pass."""
    engine = ScriptedEngine(faults=OracleFaults(raise_on=RAISES, memory_tokens=2))

    outcomes = Pipeline(engine).run([TokenSequence((RAISES,)), TokenSequence((9, 9, 9))], ["none"] * 2).outcomes

    assert [type(error) for error in outcomes] == [EngineFailed, EngineOutOfMemory]
    for error in outcomes:
        assert isinstance(error, HttpError)
        assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


# --- Isolating failures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 100, 127, 128, 255])
def test_isolating_one_failure_in_256_costs_17_passes(index: int) -> None:
    """Bisection isolates the one sequence that fails in at most 2 log2(n) + 1 passes."""
    parts: list[range] = []

    def try_pass(part: range) -> bool:
        parts.append(part)
        return index not in part

    assert isolate_failures(256, try_pass) == [index]
    assert len(parts) <= 2 * log2(256) + 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.data())
def test_bisection_covers_every_index(num_sequences: int, data: st.DataObject) -> None:
    """Exactly the failing sequences are found, and each other index is in exactly one part that passed."""
    failing = data.draw(st.sets(st.integers(0, num_sequences - 1))) if num_sequences else set()
    passed: list[int] = []

    def try_pass(part: range) -> bool:
        good = failing.isdisjoint(part)
        passed.extend(part if good else [])
        return good

    assert isolate_failures(num_sequences, try_pass) == sorted(failing)
    assert sorted(passed) == sorted(set(range(num_sequences)) - failing)


# --- Warm-up ---------------------------------------------------------------------------------------------------------

BUDGET = BatchBudget("packed", max_tokens=256, max_sequences=32)
IDS = range(10, 20)


def test_warm_up_runs_the_largest_legal_batches() -> None:
    """One longest sequence, a full budget of longest ones and one of shortest ones, without shared prefixes."""
    engine = ScriptedEngine(max_input_tokens=64)

    warm = warm_up(engine, BUDGET, IDS)

    shapes = [(len(batch), batch[0].num_tokens) for batch in engine.batches]
    assert shapes == [(1, 64), (4, 64), (32, 8)]
    assert warm.budget == BUDGET
    assert warm.num_tokens == 64 + 256 + 256
    assert all(len({sequence.token_ids[:2] for sequence in batch}) == len(batch) for batch in engine.batches)


def test_warm_up_finds_the_budget_that_fits() -> None:
    """A device without memory for the requested budget starts with half of it, or half of that."""
    engine = ScriptedEngine(max_input_tokens=50, faults=OracleFaults(memory_tokens=70))

    assert warm_up(engine, BUDGET, IDS).budget.max_tokens == 64


def test_warm_up_of_a_budget_below_the_longest_sequence() -> None:
    """The longest sequence is run alone even if it is longer than the budget."""
    engine = ScriptedEngine(max_input_tokens=1000)

    warm_up(engine, BUDGET, IDS)

    assert [(len(batch), batch[0].num_tokens) for batch in engine.batches] == [(1, 1000), (1, 256), (32, 8)]


class SlowEngine(ScriptedEngine):
    """An engine with attention heads that needs a millisecond per token on its own clock."""

    def __init__(self) -> None:
        super().__init__(max_input_tokens=8192)
        self._info = replace(self._info, attention_heads=4)

    def clock(self) -> float:
        return sum(sequence.num_tokens for batch in self.batches for sequence in batch) / 1000


class GivenMemory:
    """Memory of a made-up host."""

    def __init__(self, available: int, growth: int | None = 2**20) -> None:
        self._available = available
        self._growth = growth

    def available(self) -> int:
        return self._available

    def growth(self, work: Callable[[], None]) -> int | None:
        work()
        return self._growth


def test_warm_up_of_a_slow_cpu_bounds_the_memory_of_the_largest_batch() -> None:
    """Passes of up to a quarter of a second show that 8,192 tokens fit, which would take eight seconds to compute."""
    engine = SlowEngine()

    warm = warm_up(engine, BUDGET, IDS, engine.clock, GivenMemory(available=16 * 2**30))

    assert [[sequence.num_tokens for sequence in batch] for batch in engine.batches] == [[16] * 4, [64], [128], [256]]
    assert (warm.budget, warm.num_tokens) == (BUDGET, 256)
    assert warm.seconds == pytest.approx(0.256)
    assert warm.bound_bytes == 2 * 2**20 * 32 + 8 * 4 * 8192**2


@pytest.mark.parametrize("memory", [GivenMemory(available=4 * 2**30), GivenMemory(2**40, growth=None)])
def test_warm_up_computes_what_no_bound_shows_to_fit(memory: GivenMemory) -> None:
    """With less than twice the bound, or where memory cannot be measured, the largest batches are computed."""
    engine = SlowEngine()

    warm = warm_up(engine, BUDGET, IDS, engine.clock, memory)

    assert max(sequence.num_tokens for batch in engine.batches for sequence in batch) == 8192
    assert warm.bound_bytes is None


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_growth_of_memory_is_measured_at_its_peak() -> None:
    """64 MiB that the work writes and gives back are in its growth, also when memory of that size was free before."""

    def work() -> None:
        bytearray(b"x") * 2**26

    work()
    growth = ProcessMemory().growth(work)

    assert growth is not None
    assert growth >= 0.9 * 2**26  # the kernel counts pages of a thread in batches


def no_rewards(*_: object) -> list[float]:
    return []


def broken(*_: object) -> list[float]:
    raise RuntimeError("the kernel is missing")


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (ScriptedEngine(faults=OracleFaults(memory_tokens=63)), "no memory for one sequence of 64 tokens"),
        (ScriptedEngine(broken), "raised RuntimeError on a batch of 1 sequences of 64 tokens: the kernel is missing"),
        (ScriptedEngine(no_rewards), "returned 0 rewards"),
    ],
    ids=["out-of-memory", "engine-raises", "engine-loses-rewards"],
)
def test_warm_up_refuses_to_start(engine: ScriptedEngine, sentence: str) -> None:
    """An engine that fails ends the start with one sentence about what failed."""
    with pytest.raises(WarmUpFailed, match=sentence):
        warm_up(engine, BUDGET, IDS)


def test_errors_have_an_http_status() -> None:
    """Every error in an outcome is an HttpError."""
    engine = ScriptedEngine(faults=OracleFaults(raise_on=RAISES, nan_on=NAN))

    outcomes = Pipeline(engine).run([TokenSequence((RAISES,)), TokenSequence((NAN,))], ["none"] * 2).outcomes

    assert all(isinstance(outcome, HttpError) for outcome in outcomes)
