"""SIGTERM with more work in the queue than the drain has time for: every request gets an answer, and nothing stays."""

from __future__ import annotations

import asyncio
import math
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console

from loadtest.connection import Address
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.reliability.served_metrics import total
from loadtest.run_progress import RunProgress
from loadtest.servers import RunningServer, running_service
from loadtest.traffic.checking import check
from loadtest.traffic.execution import Executor, PhaseRun
from loadtest.traffic.items import WorkloadItems
from loadtest.traffic.phases import BurstStream, Phase, RequestPlanner
from loadtest.workload import WORKLOADS

RUNTIMES = ("ray", "local")
ITEMS_PER_REQUEST = 32
QUEUE_S = 20.0
"""Of work when the signal comes; the drain has six seconds."""
MAX_REQUESTS = 400
ACCEPTED_WITHIN_S = 120.0
ENDS_WITHIN_S = 15.0
GIVE_UP_S = 60.0


@dataclass(frozen=True, slots=True)
class Termination:
    """What happened after the signal."""

    requests: int
    outcomes: Counter[str]
    """Requests by what came back: ``scored``, the code of a problem, or the exception."""
    without_retry_after: int
    status: float
    """Exit status; infinite where the process did not end, or it is not known."""
    seconds: float
    orphans: int


def terminated(options: ExperimentOptions) -> list[Finding]:
    """R8: SIGTERM of ``reward-serve`` with 20 s of work in the queue, with Ray and with the local runtime."""
    with tempfile.TemporaryDirectory(prefix="reward-termination-") as name, RunProgress(Console(stderr=True)) as shown:
        folder = Path(name)
        shown.tell("writing a random checkpoint")
        model = options.model or write_random_checkpoint(folder / "random", dtype="float32")
        found: list[Finding] = []
        for runtime in RUNTIMES:
            shown.tell(f"SIGTERM with a long queue, {runtime} runtime")
            with running_service(model, "float32", folder, "--runtime", runtime, "--device", "cpu") as server:
                found += _findings(runtime, asyncio.run(_terminate(server, options.seed)))
    return found


def _findings(runtime: str, one: Termination) -> list[Finding]:
    answered = one.outcomes["scored"] + one.outcomes["draining"]
    return [
        Finding("load", f"{runtime}: requests in the queue at the signal", one.requests),
        at_least("R8", f"{runtime}: of them scored", one.outcomes["scored"], 1),
        at_least("R8", f"{runtime}: of them refused with 503 draining", one.outcomes["draining"], 1),
        at_most("R8", f"{runtime}: of them with anything else ({_listed(one.outcomes)})", one.requests - answered, 0),
        at_most("R8", f"{runtime}: refusals without Retry-After", one.without_retry_after, 0),
        at_most("R8", f"{runtime}: exit status", one.status, 0),
        at_most("R8", f"{runtime}: seconds until the end", one.seconds, ENDS_WITHIN_S),
        at_most("R8", f"{runtime}: processes left behind", one.orphans, 0),
    ]  # fmt: skip


async def _terminate(server: RunningServer, seed: int) -> Termination:
    planner = RequestPlanner(WorkloadItems(WORKLOADS["short"], seed), timeout_ms=None, seed=seed)
    executor = Executor(Address.of(server.url), give_up_s=GIVE_UP_S)
    one_s = await _seconds_of_one(executor, planner)
    requests = max(4, min(MAX_REQUESTS, math.ceil(QUEUE_S / one_s)))
    phase = Phase("queue", 0.001, [BurstStream("burst", requests, ITEMS_PER_REQUEST, train_s=0.0)])
    sending = asyncio.create_task(executor.run(phase, [], planner))
    await _until_accepted(server.url, requests * ITEMS_PER_REQUEST)
    family = server.process.children(recursive=True)
    began = time.monotonic()
    server.process.terminate()
    status = await asyncio.to_thread(_exit_status, server.process)
    seconds = time.monotonic() - began
    orphans = sum(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    run = await sending
    executor.close()
    return Termination(requests, _outcomes(run), _without_retry_after(run), status, seconds, orphans)


async def _seconds_of_one(executor: Executor, planner: RequestPlanner) -> float:
    """Return the seconds of a request on the idle service, the faster of two."""
    phase = Phase("one", 0.001, [BurstStream("one", 1, ITEMS_PER_REQUEST, train_s=0.0)])
    runs = [await executor.run(phase, [], planner) for _ in range(2)]
    return min(exchange.service_s for run in runs for exchange in run.exchanges)


async def _until_accepted(url: str, items: int) -> None:
    """Return when nearly all items are accepted and not answered."""
    give_up_at = time.monotonic() + ACCEPTED_WITHIN_S
    while time.monotonic() < give_up_at:
        if await asyncio.to_thread(total, url, "rm_inflight_items") >= 0.8 * items:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the service has not accepted the requests")


def _exit_status(process: psutil.Process) -> float:
    try:
        status: int | None = process.wait(GIVE_UP_S)  # None where the process is not a child, which the stubs deny
    except psutil.TimeoutExpired:
        return math.inf
    return math.inf if status is None else float(status)


def _outcomes(run: PhaseRun) -> Counter[str]:
    """Count requests by what came back."""
    checked = [(exchange, check(exchange, None)) for exchange in run.exchanges]
    return Counter(
        exchange.failure or one.code or ("scored" if one.num_rewards == exchange.num_items else "incomplete")
        for exchange, one in checked
    )


def _without_retry_after(run: PhaseRun) -> int:
    return sum(exchange.status == 503 and not exchange.has_retry_after for exchange in run.exchanges)


def _listed(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(outcomes.items()))
