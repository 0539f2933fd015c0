"""The state of a request: every item gets the outcome of its sequence, and the request is answered once."""

from __future__ import annotations

import pytest

from service.errors import EngineFailed, InternalError, SequenceTooLong
from service.records import Encoding, Item, LengthReport, Score, ScoreRequest, TokenIds, TokenSequence, Usage
from service.request_state import RequestState
from service.scheduling.work import plan_work

LENGTH = LengthReport(1, 1, 1, 2, False)


def new_state(*encoded: TokenSequence | SequenceTooLong) -> RequestState:
    items = tuple(Item(TokenIds((1,))) for _ in encoded)
    request = ScoreRequest(items, Encoding(), "basic", timeout_s=60)
    return RequestState(request, encoded, plan_work(items, encoded), queued_at=10.0)


async def test_items_with_equal_ids_get_one_reward() -> None:
    """Equal ids share a reward; diagnostics are shared only where the prompt has the same length."""
    state = new_state(*(TokenSequence((1, 2), num_prompt_tokens) for num_prompt_tokens in (1, 1, None)))

    state.resolve(0, Score(0.5, length=LENGTH), shared_tokens=0)

    assert state.outcomes == (Score(0.5, length=LENGTH), Score(0.5, length=LENGTH), Score(0.5))
    assert state.computed.done()


async def test_a_request_without_work_is_answered_at_once() -> None:
    """If no item could be encoded, every outcome is known before anything is queued."""
    refusal = SequenceTooLong("too long")
    state = new_state(refusal, refusal)

    assert state.computed.done()
    assert state.outcomes == (refusal, refusal)


async def test_the_first_answer_is_final() -> None:
    """After an error of the whole request, late outcomes change nothing."""
    state = new_state(TokenSequence((1, 2)))

    state.fail(EngineFailed("first"))
    state.fail(EngineFailed("second"))
    state.resolve(0, Score(0.5), shared_tokens=0)

    with pytest.raises(EngineFailed, match="first"):
        await state.computed


async def test_outcomes_need_every_item() -> None:
    """Outcomes that are read too early are an internal error, never a shorter list."""
    state = new_state(TokenSequence((1, 2)), TokenSequence((1, 3)))
    state.resolve(0, Score(0.5), shared_tokens=0)

    with pytest.raises(InternalError, match="1 items have no outcome"):
        _ = state.outcomes


async def test_usage_counts_what_was_scored_and_what_was_shared() -> None:
    """Repeated items and tokens that the engine shared are counted, for items with a reward only."""
    state = new_state(TokenSequence((1, 2, 3), 1, num_dropped=4), TokenSequence((1, 2, 3), 1), TokenSequence((7, 8), 1))
    state.resolve(0, Score(0.5), shared_tokens=1)
    state.resolve(1, EngineFailed("failed"), shared_tokens=1)
    state.record_batch(begin=12.0, engine_s=3.0)

    scored = state.scored(tokenize_s=1.0, total_s=6.0)

    assert scored.usage == Usage(prompt_tokens=7, completion_tokens=5, scored_tokens=6, shared_tokens=4)
    assert (scored.timings.queue_s, scored.timings.engine_s) == (2.0, 3.0)
