"""Batches that run out of memory: they are split, and the process stays."""

from __future__ import annotations

import json

from rich.console import Console

from loadtest.reliability.direct_requests import is_right, score
from loadtest.reliability.findings import Finding, at_least, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.reliability.served_metrics import total
from loadtest.run_progress import RunProgress
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.items import EqualItems

BATCHES = 1000
MEMORY_TOKENS = 2048
"""A pass over more of them runs out of memory."""
GOOD_ITEMS, GOOD_TOKENS = 15, 128
LARGE_TOKENS = 3000
"""Of the item of each request that needs more memory than there is, also alone."""


def out_of_memory(options: ExperimentOptions) -> list[Finding]:
    """R12: 1,000 requests, each with an item that runs out of memory, and a budget of twice the memory."""
    simulation = Simulation(1, 0.0, 2 * MEMORY_TOKENS, oracle={"memory_tokens": MEMORY_TOKENS})
    good, large = EqualItems(GOOD_TOKENS, options.seed), EqualItems(LARGE_TOKENS, options.seed + 1)
    wrong, errors = 0, 0
    with simulated_server(simulation) as server, RunProgress(Console(stderr=True)) as progress:
        before = {process.pid for process in server.processes("replica")}
        for number in range(BATCHES):
            progress.tell("requests out of memory", number, BATCHES)
            items = good.take(GOOD_ITEMS)
            *results, of_large = json.loads(score(server.url, [*items, *large.take(1)]))["results"]
            errors += "error" in of_large
            wrong += sum(not is_right(*pair) for pair in zip(items, results, strict=True))
        passes, budget = total(server.url, "rm_oom_total"), total(server.url, "rm_budget_tokens")
        died = len(before - {process.pid for process in server.processes("replica")})
    return [
        Finding("load", "requests of 15 good items and one that needs too much memory", BATCHES),
        at_least("R12", "passes that ran out of memory (rm_oom_total)", passes, BATCHES),
        at_most("R12", "processes that died", died, 0),
        at_most("R12", "good items without their reward", wrong, 0),
        at_least("R12", "items too large for the memory with an error of their own", errors, BATCHES),
        at_most("R12", "tokens of a pass afterwards", budget, MEMORY_TOKENS),
    ]
