"""The warm-up of an engine: the largest legal batches, so that a lack of memory shows at start and not under load.

On a CPU that would need more than a second for them, memory is bounded from shorter passes instead: computing a
sequence of thousands of tokens can take minutes there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from service.engines.base import Engine
from service.errors import EngineOutOfMemory, WarmUpFailed
from service.host_memory import HostMemory, ProcessMemory
from service.records import TokenSequence
from service.scheduling.budget import BatchBudget

logger = logging.getLogger(__name__)

MAX_COMPUTED_S = 1.0
"""On a CPU the largest batches are computed where they take at most so long."""
TRIAL_S = 0.25
"""Trial passes become longer until one takes so long."""
TRIAL_TOKENS = 64
TRIAL_SEQUENCES = 4
SAFETY_FACTOR = 2
"""Of the bound of memory over what the trial passes took per token, and of available memory over the bound."""
SCORE_BYTES = 8
"""Bytes for each attention score where an implementation stores all of them: float32, and as much for their softmax."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The result of a warm-up."""

    budget: BatchBudget
    """The largest budget that fits the device, at most the requested one."""

    num_tokens: int
    """Tokens of the passes from which the engine's speed is known."""

    seconds: float
    """Duration of those passes."""

    bound_bytes: int | None = None
    """Upper bound of the memory of the largest batch, where it was not computed; None: it was."""


def warm_up(
    engine: Engine,
    budget: BatchBudget,
    token_ids: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
    memory: HostMemory | None = None,
) -> WarmUp:
    """Show that the largest legal batches fit, so that a lack of memory shows at start and not under load.

    One sequence of the maximal length must fit; a budget that does not fit is halved until it does.

    Args:
        engine: the engine, which nothing else uses meanwhile.
        budget: the requested budget of a pass.
        token_ids: ordinary ids of the vocabulary, not the pad token. The sequences begin with different ids where
            there are enough, so that no engine saves memory by sharing prefixes.
        clock: seconds.
        memory: of the host; None: of this process.

    Raises:
        WarmUpFailed: the engine raised, returned the wrong number of rewards, or has no memory for one sequence of
            the maximal length.
    """
    if engine.info.device == "cpu" and engine.info.attention_heads is not None:
        bounded = _bounded(engine, engine.info.attention_heads, budget, token_ids, clock, memory or ProcessMemory())
        if bounded is not None:
            return bounded
    return _computed(engine, budget, token_ids, clock)


def _computed(engine: Engine, budget: BatchBudget, token_ids: Sequence[int], clock: Callable[[], float]) -> WarmUp:
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


def _bounded(
    engine: Engine,
    num_heads: int,
    budget: BatchBudget,
    token_ids: Sequence[int],
    clock: Callable[[], float],
    memory: HostMemory,
) -> WarmUp | None:
    """Bound the memory of the largest batches from short passes.

    Returns:
        None where the batches have to be computed: that is quick, memory cannot be measured, or the bound does not fit.
    """
    longest, ending = engine.info.max_input_tokens, engine.info.gate_pattern
    largest = largest_batches(budget, longest, token_ids, ending)
    sizes = [sum(sequence.num_tokens for sequence in batch) for batch in largest]
    # The first pass also reads the weights from the disk and creates what the libraries keep.
    _run_pass(engine, _varied_sequences(TRIAL_SEQUENCES, TRIAL_TOKENS // TRIAL_SEQUENCES, token_ids, ending))
    length = TRIAL_TOKENS
    while length + len(ending) <= longest:
        batch = _varied_sequences(1, length, token_ids, ending)
        begin = clock()
        growth = memory.growth(partial(_run_pass, engine, batch))
        seconds = clock() - begin
        if growth is None or seconds / length * sum(sizes) <= MAX_COMPUTED_S:
            return None
        if seconds >= TRIAL_S:
            bound = memory_bound(growth, length, max(sizes), num_heads)
            available = memory.available()
            logger.info("The largest batch needs at most %d of %d MiB.", bound >> 20, available >> 20)
            return WarmUp(budget, length, seconds, bound) if bound * SAFETY_FACTOR <= available else None
        length *= 2
    return None


def memory_bound(growth: int, num_tokens: int, most_tokens: int, num_heads: int) -> int:
    """Return an upper bound of the bytes that the largest batch needs on a CPU.

    All memory of a pass grows in proportion to its tokens, except attention scores where an implementation stores them.

    Args:
        growth: bytes that a pass took, for one sequence of ``num_tokens`` tokens.
        num_tokens: of that pass.
        most_tokens: of the largest batch.
        num_heads: query heads of a block.
    """
    return SAFETY_FACTOR * growth * most_tokens // num_tokens + SCORE_BYTES * num_heads * most_tokens**2


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
