"""The run itself: every contender in its own process, all ways in turns, round by round.

It says who is measured when; what the numbers mean is the report's.
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
    """One way on one workload; ``round`` counts from 0 and is None while it warms up."""

    workload: str
    round: int | None
    way: str

    @property
    def title(self) -> str:
        """The step in a few words."""
        return f"{self.workload}, {'warming up' if self.round is None else f'round {self.round + 1}'}: {self.way}"


@dataclass(slots=True)
class Run:
    """What was measured.

    ``rewards``: by workload and way. ``limits``: tokens per second by workload and round. ``flops_per_token``: of the
    model's linear layers. ``busy_shares``: by workload and way, on a GPU only.
    """

    measurements: list[Measurement] = field(default_factory=list)
    rewards: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict, repr=False)
    limits: dict[tuple[str, int], float] = field(default_factory=dict)
    flops_per_token: int = 0
    busy_shares: dict[tuple[str, str], float] = field(default_factory=dict)

    def record(self, step: Step, work: Work, outcome: Outcome) -> None:
        """Take in what a step found; the limit of a round comes before its other ways."""
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
        setup: what they score with.
        works: by the workload's name.
        num_rounds: of each workload, after one that is not counted.
        tell: is told what is done next, how many steps are done and how many there are.

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
    """Yield who scores what, when.

    Before the rounds of a workload every way scores it once, uncounted: whatever is compiled, cached or allocated once
    belongs to no round. In a round the limit comes first, and the ways take turns in coming next, for noise comes in
    waves.
    """
    for workload in workloads:
        for way in (REFERENCE, *ways):
            yield Step(workload, None, way)
        for round_ in range(num_rounds):
            first = round_ % max(len(ways), 1)
            for way in (LIMIT, *ways[first:], *ways[:first]):
                yield Step(workload, round_, way)
