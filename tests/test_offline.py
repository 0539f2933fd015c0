"""Offline scoring: every input gets one outcome, in batches within the budget, from a bounded part of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launching_engine import LaunchingOracle

from service.diagnostics.item_state import Outcome
from service.engines.base import EngineInfo, EngineOutput
from service.engines.oracle import OracleEngine, OracleFaults, byte_tokenizer, oracle_reward
from service.errors import EngineFailed, EngineUnavailable, HttpError, NonFiniteReward, SequenceTooLong
from service.offline import (
    ITEMS_PER_ENCODING,
    BatchPlanner,
    PlannedBatch,
    encode_items,
    plan_batches,
    score_batches,
    score_offline,
)
from service.pipeline import Pipeline
from service.records import BatchCost, Encoding, Exchange, Item, Score, TokenSequence
from service.scheduling.budget import BatchBudget, batch_cost
from service.settings import TokenizationSettings
from service.tokenization import Tokenization

LAW = settings(max_examples=60, deadline=None)
RAISES, NAN = 1, 2
REFUSED = SequenceTooLong("too long")


class RecordingEngine(OracleEngine):
    """The oracle; it records the batches that it computes."""

    def __init__(
        self, *, max_batch_tokens: int = 40, cost: BatchCost = "packed", faults: OracleFaults | None = None
    ) -> None:
        super().__init__(max_input_tokens=1000, max_batch_tokens=max_batch_tokens, cost=cost, faults=faults)
        self.batches: list[list[TokenSequence]] = []

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        self.batches.append(list(sequences))
        return super().forward(sequences, states=states)


class LostEngine(OracleEngine):
    """An engine whose device is lost in its second pass."""

    def __init__(self) -> None:
        super().__init__(max_batch_tokens=4)
        self._num_passes = 0

    def forward(self, sequences: Sequence[TokenSequence], *, states: bool = False) -> EngineOutput:
        self._num_passes += 1
        if self._num_passes == 2:
            raise EngineUnavailable("The device is lost.")
        return super().forward(sequences, states=states)


class SharingEngine(RecordingEngine):
    """An engine that computes common prefixes of two or more tokens once."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, min_shared_prefix_tokens=2)


def sequence(length: int, first_id: int = 9, *, prompt: int | None = None) -> TokenSequence:
    return TokenSequence((first_id, *range(100, 99 + length)), num_prompt_tokens=prompt)


def distinct(count: int, length: int = 4) -> list[TokenSequence]:
    return [sequence(length, 500 + number) for number in range(count)]


def expected(entry: TokenSequence | HttpError) -> Outcome:
    return Score(oracle_reward(entry.token_ids)) if isinstance(entry, TokenSequence) else entry


def collect(pipeline: Pipeline, encoded: Iterable[TokenSequence | HttpError], **options: Any) -> dict[int, Outcome]:
    """Score everything; an index that comes twice is an error."""
    found: dict[int, Outcome] = {}
    for index, outcome in score_offline(pipeline, encoded, **options):
        assert index not in found
        found[index] = outcome
    return found


inputs = st.lists(
    st.one_of(
        st.builds(sequence, st.integers(1, 50), st.integers(10, 13), prompt=st.one_of(st.none(), st.just(1))),
        st.just(REFUSED),
    ),
    max_size=40,
)
look_aheads = st.one_of(st.none(), st.integers(1, 300))


# --- Laws ------------------------------------------------------------------------------------------------------------


@LAW
@given(inputs, st.sampled_from(["packed", "padded"]), st.integers(1, 8), look_aheads)
def test_each_index_gets_its_own_outcome_once(
    encoded: list[TokenSequence | HttpError], cost: BatchCost, max_sequences: int, look_ahead: int | None
) -> None:
    """Whatever is repeated, refused or read ahead, every input gets its reward or its error, exactly once."""
    found = collect(
        Pipeline(RecordingEngine(cost=cost)), encoded, max_batch_sequences=max_sequences, look_ahead_tokens=look_ahead
    )

    assert found == {index: expected(entry) for index, entry in enumerate(encoded)}


@LAW
@given(inputs, st.sampled_from(["packed", "padded"]), st.integers(1, 8), look_aheads)
def test_batches_are_within_the_budget(
    encoded: list[TokenSequence | HttpError], cost: BatchCost, max_sequences: int, look_ahead: int | None
) -> None:
    """A pass holds no more tokens and sequences than the budget, unless it is a single sequence."""
    engine = RecordingEngine(cost=cost)

    collect(Pipeline(engine), encoded, max_batch_sequences=max_sequences, look_ahead_tokens=look_ahead)

    for batch in engine.batches:
        assert len(batch) <= max_sequences
        assert len(batch) == 1 or batch_cost([entry.num_tokens for entry in batch], cost) <= 40


@LAW
@given(inputs, look_aheads)
def test_progress_sums_up_to_the_inputs(encoded: list[TokenSequence | HttpError], look_ahead: int | None) -> None:
    """The progress callback has counted an input when its result is yielded, and all of them at the end."""
    counted: list[int] = []
    results = score_offline(Pipeline(RecordingEngine()), encoded, look_ahead_tokens=look_ahead, advance=counted.append)

    for num_yielded, _ in enumerate(results, start=1):
        assert sum(counted) >= num_yielded

    assert sum(counted) == len(encoded)


@LAW
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 300))
def test_only_the_look_ahead_is_read(lengths: list[int], look_ahead: int) -> None:
    """What was read and has no result yet is at most the look-ahead, one sequence more, and the batch that runs."""
    num_open_tokens = most = 0

    def read() -> Iterator[TokenSequence]:
        nonlocal num_open_tokens, most
        for number, length in enumerate(lengths):
            num_open_tokens += length
            most = max(most, num_open_tokens)
            yield sequence(length, 500 + number)

    for index, _ in score_offline(Pipeline(RecordingEngine()), read(), look_ahead_tokens=look_ahead):
        num_open_tokens -= lengths[index]

    assert most <= look_ahead + 50 + 50
    assert num_open_tokens == 0


@LAW
@given(st.lists(st.sampled_from(["good", "raises", "nan"]), min_size=1, max_size=30))
def test_a_failing_sequence_fails_alone(kinds: list[str]) -> None:
    """A sequence that makes the pass raise, or has no finite reward, fails; the other sequences are scored."""
    first_id = {"good": 9, "raises": RAISES, "nan": NAN}
    sequences = [TokenSequence((first_id[kind], 100 + number)) for number, kind in enumerate(kinds)]
    engine = RecordingEngine(faults=OracleFaults(raise_on=RAISES, nan_on=NAN))

    found = collect(Pipeline(engine), sequences)

    for number, kind in enumerate(kinds):
        if kind == "good":
            assert found[number] == expected(sequences[number])
        else:
            assert type(found[number]) is (EngineFailed if kind == "raises" else NonFiniteReward)


# --- Order and memory ------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_completion() -> None:
    """A result is yielded when its batch is complete, before the next batch is computed."""
    engine = RecordingEngine(max_batch_tokens=8)

    num_passes = [len(engine.batches) for _ in score_offline(Pipeline(engine), distinct(6))]

    assert num_passes == [1, 1, 2, 2, 3, 3]


def test_an_endless_input_is_scored_as_it_is_read() -> None:
    """With a look-ahead the input need not end: the first results come after a limited number of inputs was read."""
    num_read = 0

    def endless() -> Iterator[TokenSequence]:
        nonlocal num_read
        while True:
            num_read += 1
            yield sequence(4, 500 + num_read)

    results = score_offline(Pipeline(RecordingEngine(max_batch_tokens=16)), endless(), look_ahead_tokens=64)
    indices = {next(results)[0] for _ in range(100)}

    assert len(indices) == 100
    assert num_read <= 100 + 32


def test_refusals_alone_do_not_fill_the_memory() -> None:
    """Of an input of nothing but errors, only the look-ahead is read before they are yielded."""
    num_read = 0

    def refusals() -> Iterator[HttpError]:
        nonlocal num_read
        while True:
            num_read += 1
            yield REFUSED

    index, outcome = next(score_offline(Pipeline(RecordingEngine()), refusals(), look_ahead_tokens=10))

    assert (index, outcome, num_read) == (0, REFUSED, 10)


def test_out_of_memory_halves_the_batch_and_the_budget() -> None:
    """A batch that does not fit is computed in halves, and later batches are planned smaller."""
    engine = RecordingEngine(max_batch_tokens=64, faults=OracleFaults(memory_tokens=20))
    sequences = distinct(40)

    found = collect(Pipeline(engine), sequences)

    assert found == {number: expected(one) for number, one in enumerate(sequences)}
    sizes = [sum(entry.num_tokens for entry in batch) for batch in engine.batches]
    assert sizes[:3] == [64, 32, 16]
    assert max(sizes[-5:]) <= 16
    assert sum(size > 20 for size in sizes) <= 5


def test_a_lost_device_ends_the_run() -> None:
    """When no batch can be computed any more, the error is raised and not given to every remaining sequence."""
    results = score_offline(Pipeline(LostEngine()), distinct(3))
    next(results)

    with pytest.raises(EngineUnavailable):
        next(results)


# --- Passes ahead ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launch_ahead", "most"), [(True, 2), (False, 1)])
def test_a_pass_is_launched_before_the_previous_one_is_complete(*, launch_ahead: bool, most: int) -> None:
    """An engine that launches ahead has at most two passes, or one where the caller chooses; all rewards are right."""
    engine = LaunchingOracle(max_batch_tokens=12)
    encoded: list[TokenSequence | HttpError] = [
        TokenSequence((60, 7, number)) if number % 5 else REFUSED for number in range(40)
    ]

    batches = list(score_batches(Pipeline(engine), encoded, look_ahead_tokens=24, launch_ahead=launch_ahead))
    engine.close()

    assert dict(result for batch in batches for result in batch.results) == {
        index: expected(entry) for index, entry in enumerate(encoded)
    }
    assert engine.max_in_flight == most


def stops_early(encoded: Iterable[TokenSequence], pipeline: Pipeline) -> None:
    next(iter(score_offline(pipeline, encoded)))


def input_breaks(encoded: Iterable[TokenSequence], pipeline: Pipeline) -> None:
    def broken() -> Iterator[TokenSequence]:
        yield from encoded
        raise OSError("the file cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        for _ in score_offline(pipeline, broken(), look_ahead_tokens=24):
            pass


@pytest.mark.parametrize("leave", [stops_early, input_breaks])
def test_the_engine_is_usable_after_an_early_end(leave: Callable[[Iterable[TokenSequence], Pipeline], None]) -> None:
    """A caller that stops early, or an input that fails, leaves no launched pass behind."""
    engine = LaunchingOracle(max_batch_tokens=12)
    pipeline = Pipeline(engine)
    sequences = [TokenSequence((60, 7, number)) for number in range(40)]

    leave(sequences, pipeline)
    found = collect(pipeline, sequences)
    engine.close()

    assert found == {index: expected(entry) for index, entry in enumerate(sequences)}


# --- Planning --------------------------------------------------------------------------------------------------------


def test_equal_prompts_share_their_batch() -> None:
    """Completions of one prompt are in one batch, however far apart they are in the input."""
    long, short = (1, 2, 3, 4), (5, 6)
    sequences = [
        TokenSequence((*long, 7, 8), num_prompt_tokens=4),
        TokenSequence((*short, 7), num_prompt_tokens=2),
        TokenSequence((*long, 9), num_prompt_tokens=4),
        TokenSequence((*short, 8), num_prompt_tokens=2),
    ]

    batches = list(plan_batches(sequences, BatchBudget("packed", 11, 10)))

    assert [sorted(batch.indices) for batch in batches] == [[(1,), (3,)], [(0,), (2,)]]


def test_shared_prefixes_count_once() -> None:
    """Where the engine shares prefixes, a batch holds as many sequences as it has tokens to compute."""
    prompt = tuple(range(30))
    sequences = [TokenSequence((*prompt, 100 + number), num_prompt_tokens=30) for number in range(10)]
    engine = SharingEngine(max_batch_tokens=40)

    collect(Pipeline(engine), sequences)

    assert [len(batch) for batch in engine.batches] == [10]


def test_padded_batches_hold_similar_lengths() -> None:
    """For a padded engine, sequences of alternating lengths are separated, so that hardly any padding is computed."""
    sequences = [sequence(2 if number % 2 else 20, 500 + number) for number in range(16)]

    batches = list(plan_batches(sequences, BatchBudget("padded", 160, 64)))

    lengths = [[entry.num_tokens for entry in batch.sequences] for batch in batches]
    assert lengths == [[2] * 8, [20] * 8]


def test_equal_sequences_are_computed_once() -> None:
    """Repetitions are answered by one computation, but not where the completion begins at another token."""
    one, another = TokenSequence((7, 8, 9), num_prompt_tokens=1), TokenSequence((7, 8, 9), num_prompt_tokens=2)

    (batch,) = plan_batches([one, another, one], BatchBudget("packed", 100, 100))

    assert dict(zip(batch.sequences, batch.indices, strict=True)) == {one: (0, 2), another: (1,)}


def test_nothing_to_plan() -> None:
    """An empty input has no batch, and no results."""
    assert BatchPlanner([]).take(BatchBudget("packed", 1, 1)) == (None, [])
    assert list[PlannedBatch](plan_batches([], BatchBudget("padded", 1, 1))) == []
    assert collect(Pipeline(RecordingEngine()), []) == {}


# --- Encoding --------------------------------------------------------------------------------------------------------


def test_items_are_encoded_in_order_and_in_parts() -> None:
    """Items of any iterable become sequences or errors in order, and only one call's worth of them is read ahead."""
    tokenizer = byte_tokenizer(8)
    tokenization = Tokenization(tokenizer, TokenizationSettings(), max_input_tokens=8, vocab_size=len(tokenizer))
    num_read = 0

    def items() -> Iterator[Item]:
        nonlocal num_read
        while True:
            num_read += 1
            yield Item(Exchange("ab", "c" if num_read % 2 else "c" * 9))

    encoded = encode_items(tokenization, items(), Encoding())
    first, second = next(encoded), next(encoded)

    assert isinstance(first, TokenSequence)
    assert first.token_ids == tuple(b"abc")
    assert isinstance(second, SequenceTooLong)
    assert num_read == ITEMS_PER_ENCODING


@pytest.mark.parametrize("look_ahead_tokens", [0, -3])
def test_a_look_ahead_of_nothing_is_refused(look_ahead_tokens: int) -> None:
    """Without a token to read ahead no input would be read, and every index would be lost."""
    with pytest.raises(ValueError, match="look_ahead_tokens"):
        BatchPlanner([], look_ahead_tokens=look_ahead_tokens)
