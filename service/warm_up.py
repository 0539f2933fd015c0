"""The warm-up of an engine: the largest legal batches, so that a lack of memory shows at start and not under load."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.engines.base import Engine
from service.errors import EngineOutOfMemory, WarmUpFailed
from service.records import TokenSequence
from service.scheduling.budget import BatchBudget

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The result of a warm-up."""

    budget: BatchBudget
    """The largest budget that fits the device, at most the requested one."""

    num_tokens: int
    """Tokens of the passes within that budget."""

    seconds: float
    """Duration of the passes within that budget."""


def warm_up(
    engine: Engine, budget: BatchBudget, token_ids: Sequence[int], clock: Callable[[], float] = time.perf_counter
) -> WarmUp:
    """Run the largest legal batches, so that a lack of memory shows at start and not under load.

    One sequence of the maximal length must fit; a budget that does not fit is halved until it does.

    Args:
        engine: the engine, which nothing else uses meanwhile.
        budget: the requested budget of a pass.
        token_ids: ordinary ids of the vocabulary, not the pad token. The sequences begin with different ids where
            there are enough, so that no engine saves memory by sharing prefixes.
        clock: seconds.

    Raises:
        WarmUpFailed: the engine raised, returned the wrong number of rewards, or has no memory for one sequence of
            the maximal length.
    """
    longest = engine.info.max_input_tokens
    while True:
        batches = largest_batches(budget, longest, token_ids, engine.info.gate_pattern)
        begin = clock()
        num_fitting = 0
        try:
            for batch in batches:
                _run_pass(engine, batch)
                num_fitting += 1
        except EngineOutOfMemory as error:
            if not num_fitting:
                raise WarmUpFailed(
                    f"The device has no memory for one sequence of {longest} tokens, the maximal length; "
                    "lower model.max_input_tokens or use a device with more memory."
                ) from error
            budget = budget.halved()
            logger.warning("Out of memory at warm-up; the batch budget is now %d tokens.", budget.max_tokens)
            continue
        num_tokens = sum(sequence.num_tokens for batch in batches for sequence in batch)
        return WarmUp(budget, num_tokens, clock() - begin)


def _run_pass(engine: Engine, batch: Sequence[TokenSequence]) -> None:
    size = f"{len(batch)} sequences of {batch[0].num_tokens} tokens"
    try:
        output = engine.forward(batch)
    except EngineOutOfMemory:
        raise
    except Exception as error:
        raise WarmUpFailed(f"The engine raised {type(error).__name__} on a batch of {size}: {error}") from error
    if len(output.rewards) != len(batch):
        raise WarmUpFailed(f"The engine returned {len(output.rewards)} rewards for a batch of {size}.")


def largest_batches(
    budget: BatchBudget, max_input_tokens: int, token_ids: Sequence[int], ending: tuple[int, ...] = ()
) -> list[list[TokenSequence]]:
    """Return the batches that need the most memory; every sequence has the ``ending``.

    They are one sequence of the maximal length, a full budget of sequences as long as possible, and a full budget of as
    many sequences as possible.
    """
    long = min(max_input_tokens, budget.max_tokens)
    num_long = min(budget.max_tokens // long, budget.max_sequences)
    num_short = min(budget.max_sequences, max(budget.max_tokens // (len(ending) + 1), 1))
    short = min(budget.max_tokens // num_short, max_input_tokens)
    shapes = dict.fromkeys([(1, max_input_tokens), (num_long, long), (num_short, short)])
    return [_varied_sequences(count, length - len(ending), token_ids, ending) for count, length in shapes]


def _varied_sequences(
    count: int, length: int, token_ids: Sequence[int], ending: tuple[int, ...]
) -> list[TokenSequence]:
    # Every pass through the vocabulary uses a larger step, so that two sequences share at most their first token.
    num_ids = len(token_ids)
    return [
        TokenSequence(
            (*(token_ids[(index + position * (1 + index // num_ids)) % num_ids] for position in range(length)), *ending)
        )
        for index in range(count)
    ]
