"""A run of ``loadtest.latency``: starts the service, sends single items under three loads, and reports the stages."""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from loadtest.console import report_console
from loadtest.forward_pass import ForwardPass, running_forward_pass
from loadtest.latency_loads import WARM_UP, capacity_per_s, latencies_one_at_a_time, latencies_under_load
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.run_progress import RunProgress, duration
from loadtest.served_dtype import served_dtype
from loadtest.servers import running_service
from loadtest.simulated_queue import latencies_one_by_one
from loadtest.stage_latencies import FORWARD, ONE_BY_ONE, StageLatencies, stage_table
from loadtest.wire import UnexpectedAnswer
from service.errors import StartupError
from service.outputs import write_text

LOAD_S = {"model": 15.0, "local": 20.0, "ray": 60.0}
"""Seconds for the engine in process and for each start, for the estimate that is printed first."""

REQUEST_S = 0.05
"""Seconds of a request, for the same estimate."""


@dataclass(frozen=True, slots=True)
class RuntimeLatencies:
    """What was measured with one runtime of the service."""

    runtime: str

    capacity_per_s: float
    """Items per second over as many connections as keep the engine busy."""

    loads: Sequence[StageLatencies]

    def as_json(self) -> dict[str, Any]:
        """Return the figures JSON-ready."""
        loads = [one.as_json() for one in self.loads]
        return {"runtime": self.runtime, "capacity_per_s": self.capacity_per_s, "loads": loads}


class Steps:
    """The steps of a run, with the seconds that each is expected to take, shown as they begin.

    Args:
        options: of the command.
        progress: that shows them.
    """

    def __init__(self, options: argparse.Namespace, progress: RunProgress) -> None:
        self._left = planned_steps(options)
        self._total = len(self._left)
        self._progress = progress

    def begin(self) -> None:
        """Show the next step."""
        title = self._left[0][0]
        self._progress.tell(title, self._total - len(self._left), self._total, sum(step[1] for step in self._left))
        del self._left[0]


def planned_steps(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Return title and expected seconds of each step; those of starts and requests are of a 24M model on two cores."""
    requests_s = (options.requests + WARM_UP) * REQUEST_S
    steps = [("Loading the model", LOAD_S["model"])]
    for runtime in options.runtime:
        steps += [
            (f"{runtime}: starting the service", LOAD_S[runtime]),
            (f"{runtime}: one request at a time", 2 * requests_s),
            (f"{runtime}: measuring the capacity", options.capacity_s),
            (f"{runtime}: {options.load:.0%} of the capacity", options.load_s),
        ]
    return steps


def run(options: argparse.Namespace) -> int:
    """Measure as the command's options say; return the exit status."""
    console = report_console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the service ends too
    if options.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    expected_s = sum(seconds for _, seconds in planned_steps(options))
    console.print(f"This takes about {duration(expected_s)} with a model of 24M parameters.", markup=False)
    try:
        with tempfile.TemporaryDirectory(prefix="reward-latency-") as folder:
            report, tables = _measure(options, Path(folder), console)
    except (StartupError, UnexpectedAnswer, OSError, EOFError) as error:
        console.print(f"loadtest.latency: {type(error).__name__}: {error}", markup=False, style="red")
        return 1
    except KeyboardInterrupt:
        return 130
    for table in tables:
        console.print(table)
    if options.json is not None:
        write_text(options.json, json.dumps(report, indent=2) + "\n")
    return 0


def _measure(options: argparse.Namespace, folder: Path, console: Console) -> tuple[dict[str, Any], list[Table]]:
    """Measure everything; return the report JSON-ready, and a table for each runtime."""
    with RunProgress(console) as progress:
        steps = Steps(options, progress)
        dtype = served_dtype(options.dtype, options.model, torch.device("cpu"))
        model = options.model or write_random_checkpoint(folder / "random-24m", dtype=dtype)
        steps.begin()
        with running_forward_pass(options, model, dtype) as forward:
            found = [
                _runtime_latencies(options, runtime, model, dtype, folder, forward, steps)
                for runtime in options.runtime
            ]
        found = [_with_simulation(one, options.seed) for one in found]
    report = {
        "model": str(options.model) if options.model else "random, 24 million parameters",
        "dtype": dtype,
        "workload": options.workload,
        "seed": options.seed,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "runtimes": [one.as_json() for one in found],
    }
    return report, [_table(one) for one in found]


def _runtime_latencies(
    options: argparse.Namespace,
    runtime: str,
    model: Path,
    dtype: str,
    folder: Path,
    forward: ForwardPass,
    steps: Steps,
) -> RuntimeLatencies:
    """Start the service with a runtime, measure it under three loads, and stop it."""
    steps.begin()
    with running_service(model, dtype, folder, "--runtime", runtime) as server:
        steps.begin()
        alone = latencies_one_at_a_time(server.url, options, forward.seconds)
        steps.begin()
        capacity = capacity_per_s(server.url, options, alone)
        steps.begin()
        loaded = latencies_under_load(server.url, options, capacity)
    return RuntimeLatencies(runtime, capacity, (alone, loaded))


def _with_simulation(found: RuntimeLatencies, seed: int) -> RuntimeLatencies:
    """Add what items one by one would need to the loads whose items arrive at times of their own."""
    forward_s = found.loads[0].seconds[FORWARD]
    loads = [
        one
        if one.rate_per_s is None
        else one.beside(ONE_BY_ONE, latencies_one_by_one(forward_s, one.rate_per_s, seed=seed))
        for one in found.loads
    ]
    return replace(found, loads=loads)


def _table(found: RuntimeLatencies) -> Table:
    table = stage_table(f"runtime {found.runtime}, capacity {found.capacity_per_s:.1f} items/s", found.loads)
    failed = sum(one.num_failed for one in found.loads)
    requests = ", ".join(f"{one.load}: {one.num_requests} requests" for one in found.loads)
    table.caption = f"{requests}; {failed} got no reward. Quantiles of stages do not add up to those of the total."
    return table
