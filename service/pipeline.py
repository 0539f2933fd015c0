"""One batch, from sequences to Scores: forward pass, checks, diagnostics.

Synchronous, without a queue and without asyncio: the server, the batch jobs and the audit all score through it, so that
served and audited rewards cannot differ.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from reward_client.options import DiagnosticsLevel

from service.batch_run import BatchRun, Outputs
from service.diagnostics.diagnosis import Diagnostician
from service.diagnostics.item_state import Outcome
from service.engines.base import Engine
from service.errors import HttpError, NonFiniteReward
from service.records import Score, TokenSequence
from service.reward_rule import RewardRule


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
class StartedBatch:
    """A batch between ``Pipeline.start`` and ``Pipeline.finish``."""

    run: BatchRun

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
        run = BatchRun(self.engine, sequences, states=any(needs_states))
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

    def _read_states(self, outcomes: list[Outcome], run: BatchRun, needed: Sequence[bool]) -> None:
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
                    # What was measured, because a diagnostician may return a Score with more than the statistics.
                    outcomes[index] = _with_outputs(found, score)


def _with_outputs(found: Score, score: Score) -> Score:
    """Return a Score with the outputs of another; most models have none."""
    if not score.outputs and not score.step_outputs:
        return found
    return replace(found, outputs=score.outputs, step_outputs=score.step_outputs, step_rewards=score.step_rewards)


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
        # A single output is the reward alone, also where other sequences of the pass have steps.
        outputs = tuple(pooled) if len(pooled) > 1 else ()
        return Score(rule.reward_of(pooled), outputs=outputs, reward_std=rule.std_of(pooled))
    rewards = [reward for reward in map(rule.reward_of, steps) if reward is not None]
    return Score(
        rule.aggregate(rewards) if rewards else None,
        step_outputs=tuple(map(tuple, steps)),
        step_rewards=tuple(rewards),
    )
