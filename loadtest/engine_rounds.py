"""The run of an engine comparison: every contender in its own process, all ways alternately, round by round.

It decides the order of the measurements; the report evaluates them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from loadtest.contenders import LIMIT, REFERENCE, Contender, Outcome, Setup
from loadtest.engine_report import Measurement
from loadtest.engine_work import Work
from loadtest.measuring_process import MeasuringProcess, running
from loadtest.run_progress import RunTimeEstimate, Tell

SAMPLE_SEQUENCES = 4
"""Sequences of the first workload that every way scores once for the first estimate of the run time."""


@dataclass(frozen=True, slots=True)
class Step:
    """One way on one workload."""

    workload: str

    round: int | None
    """From 0; None for the warm-up, which is not counted."""

    way: str

    @property
    def title(self) -> str:
        """The step in a few words, for the progress display."""
        return f"{self.workload}, {'warming up' if self.round is None else f'round {self.round + 1}'}: {self.way}"


@dataclass(slots=True)
class Run:
    """All results."""

    measurements: list[Measurement] = field(default_factory=list)

    rewards: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict, repr=False)
    """By workload and way."""

    limits: dict[tuple[str, int], float] = field(default_factory=dict)
    """Tokens per second of the limit, by workload and round."""

    flops_per_token: int = 0
    """Of the model's linear layers."""

    busy_shares: dict[tuple[str, str], float] = field(default_factory=dict)
    """By workload and way, on a GPU only."""

    def record(self, step: Step, work: Work, outcome: Outcome) -> None:
        """Add the outcome of a step; the limit of a round is recorded before its other ways."""
        if step.round is None:
            self.rewards[step.workload, step.way] = outcome.rewards
            if outcome.busy_share is not None:
                self.busy_shares[step.workload, step.way] = outcome.busy_share
        elif step.way == LIMIT:
            self.limits[step.workload, step.round] = outcome.limit_tokens_per_s
            self.flops_per_token = outcome.flops_per_token
        else:
            self.measurements.append(
                Measurement(
                    workload=step.workload,
                    way=step.way,
                    round=step.round,
                    seconds=outcome.seconds,
                    num_items=len(work.sequences),
                    num_tokens=work.num_tokens,
                    num_computed=work.num_tokens - outcome.num_shared,
                    limit_tokens_per_s=self.limits[step.workload, step.round],
                )
            )


def run_rounds(
    contenders: Mapping[str, Contender],
    setup: Setup,
    works: Mapping[str, Work],
    num_rounds: int,
    tell: Tell,
) -> Run:
    """Measure all ways of all contenders on all work.

    Args:
        contenders: by name; one of them has the limit, one the reference.
        setup: of all contenders.
        works: by the workload's name.
        num_rounds: of each workload, after a warm-up that is not counted.
        tell: called before each step.

    Raises:
        ContenderFailedError: one could not be loaded, or raised.
    """
    run = Run()
    with ExitStack() as stack:
        tell("Loading the models", 0, 1, None)
        processes = [stack.enter_context(running(contender, setup, name)) for name, contender in contenders.items()]
        holders = {way: process for process in processes for way in process.wait_until_loaded()}
        ways = [way for way in holders if way not in (LIMIT, REFERENCE)]
        steps = list(plan_steps(list(works), ways, num_rounds))
        estimate = _first_estimate(holders, next(iter(works.values())), tell)
        for number, step in enumerate(steps):
            planned = [(later.way, _size(later.way, works[later.workload])) for later in steps[number:]]
            tell(step.title, number, len(steps), estimate.seconds_for(planned))
            work = works[step.workload]
            started = time.perf_counter()
            run.record(step, work, holders[step.way].score(step.way, work))
            estimate.observe(step.way, _size(step.way, work), time.perf_counter() - started)
    return run


def _first_estimate(holders: Mapping[str, MeasuringProcess], work: Work, tell: Tell) -> RunTimeEstimate:
    """Let every way score a few sequences, so that the run time is known early."""
    estimate = RunTimeEstimate()
    num = SAMPLE_SEQUENCES
    sample = replace(work, sequences=work.sequences[:num], groups=work.groups[:num])
    for number, (way, process) in enumerate(holders.items()):
        tell(f"Estimating the run time: {way}", number, len(holders), None)
        started = time.perf_counter()
        process.score(way, sample)
        estimate.observe(way, _size(way, sample), time.perf_counter() - started)
    return estimate


def _size(way: str, work: Work) -> int:
    """Return what the time of a way is proportional to; the limit multiplies the same matrices for any work."""
    return 1 if way == LIMIT else work.num_tokens


def plan_steps(workloads: Sequence[str], ways: Sequence[str], num_rounds: int) -> Iterator[Step]:
    """Yield the steps in order.

    Before the rounds of a workload every way scores it once, uncounted, so that compilation, caches and allocations
    are in no round. In a round the limit is first; which way follows it changes with every round, because noise on a
    machine is correlated in time.
    """
    for workload in workloads:
        for way in (REFERENCE, *ways):
            yield Step(workload, None, way)
        for round_ in range(num_rounds):
            first = round_ % max(len(ways), 1)
            for way in (LIMIT, *ways[first:], *ways[:first]):
                yield Step(workload, round_, way)
