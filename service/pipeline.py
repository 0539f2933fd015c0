"""One batch, from sequences to Scores: forward pass, checks, diagnostics.

Synchronous, without a queue and without asyncio: the online path, the batch job and the audit all score through it, so
that a served reward and an audited one cannot drift apart.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from reward_client.options import DiagnosticsLevel

from service.diagnostics.diagnosis import Diagnostician
from service.engines.base import Engine, EngineOutput, LaunchingEngine
from service.errors import (
    EngineFailed,
    EngineOutOfMemory,
    EngineUnavailable,
    HttpError,
    NonFiniteReward,
    OutputMismatch,
    WarmUpFailed,
)
from service.records import Score, TokenSequence
from service.scheduling.queue import BatchBudget, bisect

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """What became of a batch: a Score or an error for each sequence, in order, and what that took.

    ``shared_tokens``: of each sequence, the tokens that were computed for another one, or by an earlier pass; zero
    where it has no reward. ``cached_tokens``: the part of them all that earlier passes computed. ``out_of_memory``:
    some pass did not fit.
    """

    outcomes: tuple[Score | HttpError, ...]
    num_forwards: int
    out_of_memory: bool
    shared_tokens: tuple[int, ...]
    forward_s: float
    diagnose_s: float
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What the warm-up found: the budget that fits the device, and how fast the passes within it were."""

    budget: BatchBudget
    num_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StartedBatch:
    """A batch between ``Pipeline.start`` and ``Pipeline.finish``. ``started``: when, in seconds of the clock."""

    passes: _Passes
    wants_states: tuple[bool, ...]
    started: float


class Pipeline:
    """Scores batches on one engine; it is called from the engine's own thread only.

    Args:
        engine: that nobody else uses.
        diagnostician: measures the states of a batch, and completes the Scores of a request; none has no calibration.
        clock: seconds.
    """

    def __init__(
        self,
        engine: Engine,
        diagnostician: Diagnostician | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.engine = engine
        self.diagnostician = diagnostician or Diagnostician(None)
        self._clock = clock
        self._last_end = -math.inf

    def run(self, sequences: Sequence[TokenSequence], levels: Sequence[DiagnosticsLevel]) -> BatchOutcome:
        """Score a batch; every sequence gets exactly one outcome, whatever the engine does.

        A pass that raises is halved until the sequences that cannot be scored stand alone; their neighbours get their
        rewards. The reward does not depend on the level. A Score holds what a batch can tell; the rest is said by the
        diagnostician where all items of a request are known.

        Args:
            sequences: within the batch budget.
            levels: of diagnostics, one for each sequence.

        Returns:
            Scores and errors in the order of the sequences. The errors are EngineFailed, EngineOutOfMemory,
            OutputMismatch and NonFiniteReward.

        Raises:
            EngineUnavailable: the device is lost; no other batch would fare better.
        """
        return self.finish(self.start(sequences, levels))

    @property
    def passes_ahead(self) -> int:
        """Batches that may be started before the oldest started one is finished; with none each runs in its turn."""
        return int(self.engine.info.async_launch)

    def start(self, sequences: Sequence[TokenSequence], levels: Sequence[DiagnosticsLevel]) -> StartedBatch:
        """Launch a batch on an engine that launches ahead; elsewhere nothing runs before ``finish``.

        Whatever the engine raises is kept, and dealt with by ``finish`` when the batch's turn has come.

        Args:
            sequences: as ``run``.
            levels: as ``run``.
        """
        wants_states = tuple(self.diagnostician.needs_states(level) for level in levels)
        passes = _Passes(self.engine, sequences, states=any(wants_states))
        batch = StartedBatch(passes, wants_states, self._clock())
        if self.passes_ahead:
            passes.launch()
        return batch

    def finish(self, batch: StartedBatch) -> BatchOutcome:
        """Wait for a started batch and return what became of it, as ``run`` does; in the order of starting.

        The time of its passes begins where the batch before it ended, if it was started earlier.
        """
        begin = max(batch.started, self._last_end)
        batch.passes.run_all()
        computed = self._clock()
        rewards = zip(batch.passes.rewards, batch.passes.sequences, strict=True)
        outcomes = [score_of(reward, sequence) for reward, sequence in rewards]
        self._measure(outcomes, batch.passes, batch.wants_states)
        self._last_end = self._clock()
        return BatchOutcome(
            outcomes=tuple(outcomes),
            num_forwards=batch.passes.num_forwards,
            out_of_memory=batch.passes.out_of_memory,
            shared_tokens=tuple(batch.passes.shared_tokens),
            forward_s=computed - begin,
            diagnose_s=self._last_end - computed,
            cached_tokens=batch.passes.cached_tokens,
        )

    def _measure(self, outcomes: list[Score | HttpError], passes: _Passes, wanted: Sequence[bool]) -> None:
        """Put what the states say into the Scores that want it."""
        rewards = {place: outcome.reward for place, outcome in enumerate(outcomes) if isinstance(outcome, Score)}
        places = [place for place in rewards if wanted[place] and place in passes.states]
        if places:
            states = np.stack([passes.states[place] for place in places])
            measured = self.diagnostician.read_states([rewards[place] for place in places], states)
            for place, score in zip(places, measured, strict=True):
                outcomes[place] = score

    def warm_up(self, budget: BatchBudget, token_ids: Sequence[int]) -> WarmUp:
        """Run the largest legal batches, so that a lack of memory shows at start and not under load.

        A longest sequence must fit alone; where a full budget does not, it is halved until it does.

        Args:
            budget: wanted for a pass.
            token_ids: ordinary ids of the vocabulary, not the pad token; the sequences begin with different ones as far
                as they go, so that no engine saves memory by sharing prefixes.

        Raises:
            WarmUpFailed: the engine raised, answered with the wrong count, or has no room for one longest sequence.
        """
        longest = self.engine.info.max_input_tokens
        while True:
            batches = largest_batches(budget, longest, token_ids)
            begin = self._clock()
            num_fitting = 0
            try:
                for batch in batches:
                    self._warm_up_pass(batch)
                    num_fitting += 1
            except EngineOutOfMemory as error:
                if not num_fitting:
                    raise WarmUpFailed(
                        f"The device has no room for one longest sequence of {longest} tokens; "
                        "lower model.max_input_tokens or take a larger device."
                    ) from error
                budget = budget.halved()
                logger.warning("Out of memory at warm-up; the batch budget is now %d tokens.", budget.max_tokens)
                continue
            num_tokens = sum(sequence.num_tokens for batch in batches for sequence in batch)
            return WarmUp(budget, num_tokens, self._clock() - begin)

    def _warm_up_pass(self, batch: Sequence[TokenSequence]) -> None:
        size = f"{len(batch)} sequences of {batch[0].num_tokens} tokens"
        try:
            output = self.engine.forward(batch)
        except EngineOutOfMemory:
            raise
        except Exception as error:
            raise WarmUpFailed(f"The engine raised {type(error).__name__} on a batch of {size}: {error}") from error
        if len(output.rewards) != len(batch):
            raise WarmUpFailed(f"The engine returned {len(output.rewards)} rewards for a batch of {size}.")


class _Passes:
    """The forward passes over one batch, and what they have found so far."""

    def __init__(self, engine: Engine, sequences: Sequence[TokenSequence], *, states: bool) -> None:
        self._engine = engine
        self.sequences = sequences
        self._wants_states = states
        self._launched: Callable[[], EngineOutput] | None = None
        self._found: dict[int, float | HttpError] = {}
        self._failure_logged = False
        self.num_forwards = 0
        self.out_of_memory = False
        self.shared_tokens = [0] * len(sequences)
        self.cached_tokens = 0
        self.states: dict[int, NDArray[np.float32]] = {}

    @property
    def rewards(self) -> list[float | HttpError]:
        """In the order of the sequences; unchecked for being finite."""
        return [self._found[place] for place in range(len(self.sequences))]

    def launch(self) -> None:
        """Hand the whole batch to the device. What that raises is raised again where the rewards are asked for."""
        if not isinstance(self._engine, LaunchingEngine):
            return
        try:
            self._launched = self._engine.launch(self.sequences, states=self._wants_states).result
        except Exception as error:  # noqa: BLE001 - as in _passes
            self._launched = partial(_raise, error)

    def run_all(self) -> None:
        """Pass over the batch, and over its halves where it raises."""
        poison = bisect(len(self.sequences), self._passes)
        if poison:
            logger.warning("%d of %d sequences cannot be scored.", len(poison), len(self.sequences))

    def _passes(self, run: range) -> bool:
        self.num_forwards += 1
        try:
            output = self._output_of(run)
        except EngineOutOfMemory as error:
            # A new error, because this one's traceback keeps the tensors of the pass alive while its halves need room.
            self.out_of_memory = True
            self._found.update(dict.fromkeys(run, EngineOutOfMemory(str(error))))
            return False
        except EngineUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a foreign pass raises fails its sequences, not our thread
            self._log_first(error, len(run))
            self._found.update(dict.fromkeys(run, EngineFailed(f"The forward pass raised {type(error).__name__}.")))
            return False
        if len(output.rewards) == len(run):
            self._found.update(zip(run, output.rewards, strict=True))
            if output.states is not None:
                self.states.update(zip(run, output.states, strict=True))
            if output.shared_tokens:
                self.shared_tokens[run.start : run.stop] = output.shared_tokens
            self.cached_tokens += output.cached_tokens
        else:
            # Nothing tells which reward belongs to whom, so all are thrown away; a retry would trust the same code.
            mismatch = OutputMismatch(f"The engine returned {len(output.rewards)} rewards for {len(run)} sequences.")
            logger.error("%s", mismatch)
            self._found.update(dict.fromkeys(run, mismatch))
        return True

    def _output_of(self, run: range) -> EngineOutput:
        if self._launched is not None:
            launched, self._launched = self._launched, None  # the first run is the whole batch
            return launched()
        return self._engine.forward(self.sequences[run.start : run.stop], states=self._wants_states)

    def _log_first(self, error: Exception, num_sequences: int) -> None:
        """Log the traceback once a batch: the halves fail for the same reason."""
        if not self._failure_logged:
            logger.warning("A forward pass over %d sequences raised.", num_sequences, exc_info=error)
            self._failure_logged = True


def _raise(error: Exception) -> NoReturn:
    raise error


def score_of(reward: float | HttpError, sequence: TokenSequence) -> Score | HttpError:
    """Make a Score of a reward; an error stays what it is.

    A reward that is not finite becomes NonFiniteReward: it is never passed on as a number.
    """
    if isinstance(reward, HttpError):
        return reward
    if not math.isfinite(reward):
        return NonFiniteReward(f"The model answered {reward} for {sequence.num_tokens} tokens.")
    return Score(reward)


def largest_batches(budget: BatchBudget, max_input_tokens: int, token_ids: Sequence[int]) -> list[list[TokenSequence]]:
    """Return the batches that need most: one longest sequence; then a budget full of long ones, and of short ones."""
    long = min(max_input_tokens, budget.max_tokens)
    num_long = min(budget.max_tokens // long, budget.max_sequences)
    num_short = min(budget.max_sequences, budget.max_tokens)
    short = min(budget.max_tokens // num_short, max_input_tokens)
    shapes = dict.fromkeys([(1, max_input_tokens), (num_long, long), (num_short, short)])
    return [_varied_sequences(count, length, token_ids) for count, length in shapes]


def _varied_sequences(count: int, length: int, token_ids: Sequence[int]) -> list[TokenSequence]:
    # Each round through the ids takes larger steps, so that two rows have at most their first token in common.
    num_ids = len(token_ids)
    return [
        TokenSequence(tuple(token_ids[(row + column * (1 + row // num_ids)) % num_ids] for column in range(length)))
        for row in range(count)
    ]
