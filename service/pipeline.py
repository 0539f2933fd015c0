"""One batch, from sequences to Scores: forward pass, checks, diagnostics.

Synchronous, without a queue and without asyncio: the server, the batch jobs and the audit all score through it, so that
served and audited rewards cannot differ.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray
from reward_client.options import DiagnosticsLevel

from service.diagnostics.diagnosis import Diagnostician
from service.diagnostics.item_state import Outcome
from service.engines.base import Deferred, Engine, EngineOutput, LaunchingEngine, Pending
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
from service.reward_rule import RewardRule
from service.scheduling.budget import BatchBudget

logger = logging.getLogger(__name__)

Outputs: TypeAlias = float | NDArray[np.float32]
"""What the head gave for a sequence: its one output, or [steps + 1, outputs] as in ``EngineOutput``."""


@dataclass(frozen=True, slots=True)
class BatchOutcome:
    """The result of a batch and its cost."""

    outcomes: tuple[Outcome, ...]
    """A Score or an error for each sequence, in order."""

    num_forwards: int
    """Forward passes; more than one where the batch was halved."""

    out_of_memory: bool
    """Whether some pass did not fit the device."""

    shared_tokens: tuple[int, ...]
    """Tokens of each sequence that were computed for another one or by an earlier pass; 0 without a reward."""

    forward_s: float
    """Duration of the passes, in seconds."""

    diagnose_s: float
    """Duration of reading the states after the passes, in seconds."""

    cached_tokens: int = 0
    """The part of all shared tokens that was taken from the prefix cache."""


@dataclass(frozen=True, slots=True)
class WarmUp:
    """The result of a warm-up."""

    budget: BatchBudget
    """The largest budget that fits the device, at most the requested one."""

    num_tokens: int
    """Tokens of the passes within that budget."""

    seconds: float
    """Duration of the passes within that budget."""


@dataclass(frozen=True, slots=True)
class StartedBatch:
    """A batch between ``Pipeline.start`` and ``Pipeline.finish``."""

    run: _BatchRun

    needs_states: tuple[bool, ...]
    """For each sequence, whether its Score includes the statistics of its states."""

    started: float
    """In seconds of the clock."""


class Pipeline:
    """Scores batches on one engine; it is called from the engine's own thread only.

    Args:
        engine: the engine, which nothing else uses.
        diagnostician: measures the states of a batch; None: one without a calibration.
        clock: seconds.
        rule: makes rewards of the outputs of the engine; None: a single output is the reward.
    """

    def __init__(
        self,
        engine: Engine,
        diagnostician: Diagnostician | None = None,
        clock: Callable[[], float] = time.perf_counter,
        rule: RewardRule | None = None,
    ) -> None:
        self.engine = engine
        self.rule = rule or RewardRule(engine.info.outputs)
        self.diagnostician = diagnostician or Diagnostician(None)
        self._clock = clock
        self._last_end = -math.inf

    def run(self, sequences: Sequence[TokenSequence], levels: Sequence[DiagnosticsLevel]) -> BatchOutcome:
        """Score a batch; every sequence gets exactly one outcome, also if the engine fails.

        A batch whose pass raises is halved until the sequences that cannot be scored are alone in their passes; the
        other sequences of the batch get their rewards. The reward does not depend on the level. A Score holds only what
        can be computed from one batch; ``Diagnostician.complete`` adds the rest where all items of a request are known.

        Args:
            sequences: within the batch budget.
            levels: the level of diagnostics of each sequence.

        Returns:
            Scores and errors in the order of the sequences. The errors are EngineFailed, EngineOutOfMemory,
            OutputMismatch and NonFiniteReward.

        Raises:
            EngineUnavailable: the device is lost; no smaller batch would succeed.
        """
        return self.finish(self.start(sequences, levels))

    @property
    def passes_ahead(self) -> int:
        """Batches that may be started before the oldest started one is finished; 0: each runs only in ``finish``."""
        return int(self.engine.info.async_launch)

    def start(self, sequences: Sequence[TokenSequence], levels: Sequence[DiagnosticsLevel]) -> StartedBatch:
        """Launch a batch on an engine that launches ahead; elsewhere nothing runs before ``finish``.

        An error that the engine raises here is handled by ``finish``, like an error of a pass.

        Args:
            sequences: as for ``run``.
            levels: as for ``run``.
        """
        needs_states = tuple(self.diagnostician.needs_states(level) for level in levels)
        run = _BatchRun(self.engine, sequences, states=any(needs_states))
        batch = StartedBatch(run, needs_states, self._clock())
        if self.passes_ahead:
            run.launch()
        return batch

    def finish(self, batch: StartedBatch) -> BatchOutcome:
        """Wait for a started batch and return its result, as ``run`` does; called in the order of starting.

        ``forward_s`` of a batch that was started before the last one had ended counts from that end.
        """
        begin = max(batch.started, self._last_end)
        run = batch.run
        run.run_all()
        computed = self._clock()
        outcomes = [
            score_of(outputs, sequence, self.rule) for outputs, sequence in zip(run.outputs, run.sequences, strict=True)
        ]
        self._read_states(outcomes, run, batch.needs_states)
        self._last_end = self._clock()
        return BatchOutcome(
            outcomes=tuple(outcomes),
            num_forwards=run.num_forwards,
            out_of_memory=run.out_of_memory,
            shared_tokens=tuple(run.shared_tokens),
            forward_s=computed - begin,
            diagnose_s=self._last_end - computed,
            cached_tokens=run.cached_tokens,
        )

    def _read_states(self, outcomes: list[Outcome], run: _BatchRun, needed: Sequence[bool]) -> None:
        """Replace the Scores that need states by Scores with the statistics of the states."""
        rewards = {
            index: outcome.reward
            for index, outcome in enumerate(outcomes)
            if isinstance(outcome, Score) and outcome.reward is not None
        }
        indices = [index for index in rewards if needed[index] and index in run.states]
        if indices:
            states = np.stack([run.states[index] for index in indices])
            measured = self.diagnostician.read_states([rewards[index] for index in indices], states)
            for index, found in zip(indices, measured, strict=True):
                score = outcomes[index]
                if isinstance(score, Score):
                    outcomes[index] = replace(
                        score, reward_std_epistemic=found.reward_std_epistemic, traits=found.traits
                    )

    def warm_up(self, budget: BatchBudget, token_ids: Sequence[int]) -> WarmUp:
        """Run the largest legal batches, so that a lack of memory shows at start and not under load.

        One sequence of the maximal length must fit; a budget that does not fit is halved until it does.

        Args:
            budget: the requested budget of a pass.
            token_ids: ordinary ids of the vocabulary, not the pad token. The sequences begin with different ids where
                there are enough, so that no engine saves memory by sharing prefixes.

        Raises:
            WarmUpFailed: the engine raised, returned the wrong number of rewards, or has no memory for one sequence of
                the maximal length.
        """
        longest = self.engine.info.max_input_tokens
        while True:
            batches = largest_batches(budget, longest, token_ids, self.engine.info.gate_pattern)
            begin = self._clock()
            num_fitting = 0
            try:
                for batch in batches:
                    self._warm_up_pass(batch)
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


class _BatchRun:
    """The forward passes over one batch, and their results so far."""

    def __init__(self, engine: Engine, sequences: Sequence[TokenSequence], *, states: bool) -> None:
        self._engine = engine
        self.sequences = sequences
        self._needs_states = states
        self._launched: Pending[EngineOutput] | None = None
        self._found: dict[int, Outputs | HttpError] = {}
        self._failure_logged = False
        self.num_forwards = 0
        self.out_of_memory = False
        self.shared_tokens = [0] * len(sequences)
        self.cached_tokens = 0
        self.states: dict[int, NDArray[np.float32]] = {}

    @property
    def outputs(self) -> list[Outputs | HttpError]:
        """The head's outputs of each sequence, or its error, in order; they may be NaN or infinite."""
        return [self._found[index] for index in range(len(self.sequences))]

    def launch(self) -> None:
        """Launch the whole batch on the device; an error is raised again by the first pass of ``run_all``."""
        if not isinstance(self._engine, LaunchingEngine):
            return
        try:
            self._launched = self._engine.launch(self.sequences, states=self._needs_states)
        except Exception as error:  # noqa: BLE001 - as in _try_pass
            self._launched = Deferred(partial(_raise, error))

    def run_all(self) -> None:
        """Run a pass over the batch, and over its halves where it raises."""
        failed = isolate_failures(len(self.sequences), self._try_pass)
        if failed:
            logger.warning("%d of %d sequences cannot be scored.", len(failed), len(self.sequences))

    def _try_pass(self, part: range) -> bool:
        """Run a pass over a part of the batch and record its results; return whether it did not raise."""
        self.num_forwards += 1
        try:
            output = self._output_of(part)
        except EngineOutOfMemory as error:
            # A new error, because the traceback of this one would keep the tensors of the pass in memory during the
            # retries.
            self.out_of_memory = True
            self._found.update(dict.fromkeys(part, EngineOutOfMemory(str(error))))
            return False
        except EngineUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - an error of a pass fails its sequences, not the engine thread
            self._log_first(error, len(part))
            self._found.update(dict.fromkeys(part, EngineFailed(f"The forward pass raised {type(error).__name__}.")))
            return False
        self._record(part, output)
        return True

    def _record(self, part: range, output: EngineOutput) -> None:
        if len(output.rewards) != len(part) or (output.outputs is not None and len(output.outputs) != len(part)):
            # It is unknown which reward belongs to which sequence, so none is used; a retry would run the same code.
            mismatch = OutputMismatch(f"The engine returned {len(output.rewards)} rewards for {len(part)} sequences.")
            logger.error("%s", mismatch)
            self._found.update(dict.fromkeys(part, mismatch))
            return
        self._found.update(zip(part, output.rewards if output.outputs is None else output.outputs, strict=True))
        if output.states is not None:
            self.states.update(zip(part, output.states, strict=True))
        if output.shared_tokens:
            self.shared_tokens[part.start : part.stop] = output.shared_tokens
        self.cached_tokens += output.cached_tokens

    def _output_of(self, part: range) -> EngineOutput:
        if self._launched is not None:
            launched, self._launched = self._launched, None  # the first part is the whole batch
            return launched.result()
        return self._engine.forward(self.sequences[part.start : part.stop], states=self._needs_states)

    def _log_first(self, error: Exception, num_sequences: int) -> None:
        """Log the traceback once a batch: the halves fail for the same reason."""
        if not self._failure_logged:
            logger.warning("A forward pass over %d sequences raised.", num_sequences, exc_info=error)
            self._failure_logged = True


def _raise(error: Exception) -> NoReturn:
    raise error


def isolate_failures(num_sequences: int, try_pass: Callable[[range], bool]) -> list[int]:
    """Find the sequences that fail by bisection: halve each part that fails until failing sequences are alone.

    One failing sequence among n costs at most 2 log2(n) + 1 passes (n a power of two); none costs one.

    Args:
        num_sequences: number of sequences in the batch; parts are ranges over their indices.
        try_pass: tries a part and returns whether it passed. Each index ends up in exactly one part that passed, or
            failed alone.

    Returns:
        The indices that failed alone, in order.
    """
    failed: list[int] = []
    untried = [range(num_sequences)] if num_sequences else []
    while untried:
        part = untried.pop()
        if try_pass(part):
            continue
        if len(part) == 1:
            failed.append(part[0])
        else:
            middle = len(part) // 2
            untried += [part[middle:], part[:middle]]
    return failed


def score_of(outputs: Outputs | HttpError, sequence: TokenSequence, rule: RewardRule) -> Outcome:
    """Return the Score of what the head gave for a sequence; an error is returned as it is.

    A number that is NaN or infinite becomes NonFiniteReward: it is never passed on.
    """
    if isinstance(outputs, HttpError):
        return outputs
    if isinstance(outputs, float):  # one output and no steps
        reward = rule.reward_of([outputs])
        score = Score(reward)
        values = [outputs] if reward is None else [outputs, reward]
    else:
        score = _score_of_values(outputs.tolist(), rule)
        values = [*outputs.ravel().tolist(), *score.step_rewards, *([] if score.reward is None else [score.reward])]
    for value in values:
        if not math.isfinite(value):
            return NonFiniteReward(f"The model returned {value} for {sequence.num_tokens} tokens.")
    return score


def _score_of_values(values: Sequence[Sequence[float]], rule: RewardRule) -> Score:
    """Return the Score of the outputs at each step and at the pooled token."""
    *steps, pooled = values
    if not steps:
        return Score(rule.reward_of(pooled), outputs=tuple(pooled), reward_std=rule.std_of(pooled))
    rewards = [reward for reward in map(rule.reward_of, steps) if reward is not None]
    return Score(
        rule.aggregate(rewards) if rewards else None,
        step_outputs=tuple(map(tuple, steps)),
        step_rewards=tuple(rewards),
    )


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
