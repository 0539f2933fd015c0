"""The run of an engine comparison: every contender in its own process, all ways alternately, round by round.

It decides the order of the measurements; the report evaluates them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from loadtest.contenders import LIMIT, REFERENCE, Contender, Outcome, Setup
from loadtest.engine_report import Measurement
from loadtest.engine_work import Work
from loadtest.measuring_process import running


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
    tell: Callable[[str, int, int], None],
) -> Run:
    """Measure all ways of all contenders on all work.

    Args:
        contenders: by name; one of them has the limit, one the reference.
        setup: of all contenders.
        works: by the workload's name.
        num_rounds: of each workload, after a warm-up that is not counted.
        tell: called with the title of the next step, the number of completed steps and the number of all steps.

    Raises:
        ContenderFailedError: one could not be loaded, or raised.
    """
    run = Run()
    with ExitStack() as stack:
        tell("Loading", 0, 1)
        processes = [stack.enter_context(running(contender, setup, name)) for name, contender in contenders.items()]
        holders = {way: process for process in processes for way in process.wait_until_loaded()}
        ways = [way for way in holders if way not in (LIMIT, REFERENCE)]
        steps = list(plan_steps(list(works), ways, num_rounds))
        for number, step in enumerate(steps):
            tell(step.title, number, len(steps))
            work = works[step.workload]
            run.record(step, work, holders[step.way].score(step.way, work))
    return run


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
