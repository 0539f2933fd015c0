"""Runs a load test: the phases of a scenario against a server, the faults meanwhile, and the report."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module

import psutil
from rich.console import Console

from loadtest.connection import Address
from loadtest.console import report_console
from loadtest.servers import cpu_s_by_process
from loadtest.simulated_server import SimulatedServer, Simulation, simulated_server
from loadtest.traffic.checking import ORACLE, ExpectedReward, oracle_reward_of_item
from loadtest.traffic.execution import Executor, PhaseRun
from loadtest.traffic.fault_actions import CausedFault, FaultInjector
from loadtest.traffic.faults import Fault
from loadtest.traffic.items import EqualItems, ItemSource, WorkloadItems
from loadtest.traffic.machine import machine_facts, server_facts
from loadtest.traffic.phases import Phase, RequestPlanner
from loadtest.traffic.progress import shown_progress
from loadtest.traffic.report import LoadTest, PhaseCost, cost_table, table, write_report
from loadtest.traffic.scenarios import PhaseSource, Scenario
from loadtest.traffic.summary import StreamSummary, summarize
from loadtest.workload import WORKLOADS
from service.errors import ServerStartError

LONGER_THAN_LIMIT_S = 10.0
"""A request is abandoned so long after its time limit; a later answer would tell nothing more."""


def run(options: Namespace, scenario: Scenario, schedule: Sequence[Fault], arguments: Sequence[str]) -> int:
    """Run the load test and write its report; returns the exit status, 1 where an answer was wrong."""
    console = Console(stderr=True, soft_wrap=True)
    with server_of(options) as (url, server, simulation):
        machine, model = machine_facts(), server_facts(url, options.headers)
        if options.out is not None:
            find_packages_of_report()
        knows_rewards = model["engine"]["engine"] == ORACLE
        planner = RequestPlanner(items_of(options), timeout_ms=round(1000 * options.within_s), seed=options.seed)
        injector = FaultInjector(Address.of(url), server, simulation, options.seed)
        sender = PhaseSender(
            planner,
            within_s=options.within_s,
            expected=oracle_reward_of_item if knows_rewards else None,
            server_cpu_s=_cpu_of(options, server),
        )

        def executor() -> Executor:
            return Executor(
                Address.of(url),
                headers=options.headers,
                give_up_s=options.within_s + LONGER_THAN_LIMIT_S,
                max_connections=options.connections,
                reuse=not options.new_connections,
            )

        began = time.monotonic()
        asyncio.run(sender.send_all(scenario, executor, injector, schedule, console))
        share = sender.cpu_s / (time.monotonic() - began)
    test = LoadTest(
        arguments,
        options.within_s,
        knows_rewards,
        machine,
        model,
        sender.summaries,
        injector.caused,
        share,
        sender.costs,
    )
    _tell(test, injector.caused)
    if options.out is not None:
        console.print(f"The report is {write_report(test, options.out, overwrite=options.overwrite)}", highlight=False)
    return 0 if test.is_right else 1


def find_packages_of_report() -> None:
    """Import what draws the plots, so that a missing package is found before the test and not after it.

    Raises:
        ImportError: it is not installed.
    """
    import_module("loadtest.traffic.charts")


@contextlib.contextmanager
def server_of(options: Namespace) -> Iterator[tuple[str, SimulatedServer | None, Simulation | None]]:
    """Yield the URL to send to and, where the command starts the server itself, the server."""
    if options.start is None:
        yield options.url, None, None
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the server ends too
    simulation = Simulation(options.start, 1 / options.tokens_per_s, options.max_batch_tokens)
    with simulated_server(simulation) as server:
        yield server.url, server, simulation


def items_of(options: Namespace) -> ItemSource:
    """Return the items that the options ask for."""
    if options.tokens is not None:
        return EqualItems(options.tokens, options.seed)
    return WorkloadItems(WORKLOADS[options.workload], options.seed)


class PhaseSender:
    """Sends phases one after the other and checks each one's answers after its clock has stopped.

    Args:
        planner: makes the requests.
        within_s: time limit of a good answer.
        expected: gives the right rewards; None: they are unknown.
        server_cpu_s: returns the CPU seconds of the server's processes so far, by process id; None: they are unknown.
    """

    def __init__(
        self,
        planner: RequestPlanner,
        *,
        within_s: float,
        expected: ExpectedReward | None,
        server_cpu_s: Callable[[], Mapping[int, float]] | None = None,
    ) -> None:
        self.summaries: list[StreamSummary] = []
        self.costs: list[PhaseCost] = []
        self.cpu_s = 0.0
        self._planner = planner
        self._within_s = within_s
        self._expected = expected
        self._server_cpu_s = server_cpu_s

    async def send_all(
        self,
        source: PhaseSource,
        executor: Callable[[], Executor],
        injector: FaultInjector,
        schedule: Sequence[Fault],
        console: Console,
    ) -> None:
        """Send all phases of a source while the faults are caused."""
        sender = executor()
        faults = asyncio.create_task(injector.follow(schedule))
        try:
            async with shown_progress(console, sender.tally):
                first = source.first_phases()
                await self._send(first, sender)
                capacity = self.summaries[0].answered_items_per_s if self.summaries else 0.0
                await self._send(source.later_phases(capacity), sender, len(first))
        finally:
            sender.close()
            faults.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await faults

    async def _send(self, phases: Sequence[Phase], sender: Executor, begin: int = 0) -> None:
        for number, phase in enumerate(phases, begin):
            schedule = self._planner.schedule(phase, number)
            began_s = self._server_cpu_s() if self._server_cpu_s else {}
            phase_run = await sender.run(phase, schedule, self._planner)
            server_s = cpu_s_since(began_s, self._server_cpu_s()) if self._server_cpu_s else None
            self.cpu_s += phase_run.cpu_s
            self.costs.append(_cost(phase_run, server_s))
            self.summaries += await asyncio.to_thread(
                summarize, phase_run, within_s=self._within_s, expected=self._expected
            )


def _cost(run: PhaseRun, server_s: float | None) -> PhaseCost:
    server_cores = None if server_s is None else server_s / run.wall_s
    return PhaseCost(run.phase.name, run.wall_s, run.cpu_s / run.wall_s, server_cores)


def cpu_s_since(before: Mapping[int, float], now: Mapping[int, float]) -> float:
    """Return the CPU seconds between two readings of the processes that live at the second one.

    What processes that have ended since used is not known, and not counted.
    """
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in now.items())


def _cpu_of(options: Namespace, server: SimulatedServer | None) -> Callable[[], Mapping[int, float]] | None:
    """Return what measures the CPU seconds of the server's processes; None where its processes are not known.

    Raises:
        ServerStartError: there is no process of the number that was given.
    """
    if server is not None:
        return server.cpu_s_by_process
    if options.server_pid is None:
        return None
    try:
        process = psutil.Process(options.server_pid)
    except psutil.NoSuchProcess:
        raise ServerStartError(f"--server-pid: there is no process {options.server_pid}.") from None
    return lambda: cpu_s_by_process(process)


def _tell(test: LoadTest, faults: Sequence[CausedFault]) -> None:
    console = report_console()
    console.print(table(test))
    console.print(cost_table(test.costs))
    for one in test.summaries:
        if one.batches is not None:
            stall = one.batches.stall_fraction
            console.print(
                f"{one.stream}: {one.batches.num_batches} batches, stall fraction {stall:.1%}", highlight=False
            )
    for fault in faults:
        console.print(f"{fault.at_s:.1f} s: {fault.fault}: {fault.detail}", highlight=False)
    for remark in test.remarks:
        console.print(remark, highlight=False)
