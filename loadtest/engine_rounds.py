"""The run of an engine comparison: every contender in its own process, all ways alternately, round by round.

It decides the order of the measurements; the report evaluates them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from loadtest.contenders import LIMIT, REFERENCE, Contender, Outcome, Setup
from loadtest.engine_report import Measurement
from loadtest.engine_work import Work
from loadtest.measuring_process import ContenderFailedError, MeasuringProcess, running
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

    failures: dict[str, str] = field(default_factory=dict)
    """Tracebacks of the contenders and ways that failed and were left out, by name."""

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
    *,
    optional: Collection[str] = (),
    completed: Callable[[Run], None] | None = None,
) -> Run:
    """Measure all ways of all contenders on all work.

    Args:
        contenders: by name; one of them has the limit, one the reference.
        setup: of all contenders.
        works: by the workload's name.
        num_rounds: of each workload, after a warm-up that is not counted.
        tell: called before each step.
        optional: names of the contenders that are left out when they fail.
        completed: called with all results so far after each workload.

    Raises:
        ContenderFailedError: one that is not optional could not be loaded, or raised.
    """
    run = Run()
    with ExitStack() as stack:
        tell("Loading the models", 0, 1, None)
        processes = {name: stack.enter_context(running(one, setup, name)) for name, one in contenders.items()}
        ways = _Ways(processes, optional, run.failures)
        steps = list(
            plan_steps(list(works), [way for way in ways.holders if way not in (LIMIT, REFERENCE)], num_rounds)
        )
        estimate = _first_estimate(ways, next(iter(works.values())), tell)
        for number, step in enumerate(steps):
            planned = [
                (later.way, _size(later.way, works[later.workload]))
                for later in steps[number:]
                if later.way not in run.failures
            ]
            tell(step.title, number, len(steps), estimate.seconds_for(planned))
            work = works[step.workload]
            started = time.perf_counter()
            if (outcome := ways.score(step.way, work)) is not None:
                run.record(step, work, outcome)
                estimate.observe(step.way, _size(step.way, work), time.perf_counter() - started)
            is_last = number + 1 == len(steps) or steps[number + 1].workload != step.workload
            if is_last and completed is not None:
                completed(run)
    return run


class _Ways:
    """The ways of all processes, without those that have failed.

    Args:
        processes: by the contender's name; they are loading.
        optional: names of the contenders that are left out when they fail.
        failures: tracebacks by name; failures are added to it.

    Raises:
        ContenderFailedError: a contender that is not optional could not be loaded.
    """

    def __init__(
        self, processes: Mapping[str, MeasuringProcess], optional: Collection[str], failures: dict[str, str]
    ) -> None:
        self.holders: dict[str, MeasuringProcess] = {}
        self._failures = failures
        self._optional: set[str] = set()
        for name, process in processes.items():
            try:
                ways = process.wait_until_loaded()
            except ContenderFailedError as error:
                if name not in optional:
                    raise
                failures[name] = error.details
                continue
            self.holders |= dict.fromkeys(ways, process)
            if name in optional:
                self._optional.update(ways)

    def score(self, way: str, work: Work) -> Outcome | None:
        """Score the work; None where an optional way has failed, now or earlier.

        Raises:
            ContenderFailedError: a way that is not optional raised.
        """
        if way in self._failures:
            return None
        try:
            return self.holders[way].score(way, work)
        except ContenderFailedError as error:
            if way not in self._optional:
                raise
            self._failures[way] = error.details
            return None


def _first_estimate(ways: _Ways, work: Work, tell: Tell) -> RunTimeEstimate:
    """Let every way score a few sequences, so that the run time is known early."""
    estimate = RunTimeEstimate()
    num = SAMPLE_SEQUENCES
    sample = replace(work, sequences=work.sequences[:num], groups=work.groups[:num])
    for number, way in enumerate(ways.holders):
        tell(f"Estimating the run time: {way}", number, len(ways.holders), None)
        started = time.perf_counter()
        ways.score(way, sample)
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
