"""Passes that run out of memory: the batch is split, later ones are smaller, and the process stays."""

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
from service.engines.oracle import MEMORY_BYTE

REQUESTS = 1000
ITEMS, ITEM_TOKENS = 16, 128
PASS_TOKENS = ITEMS * ITEM_TOKENS


def out_of_memory(options: ExperimentOptions) -> list[Finding]:
    """R12: 1,000 requests that fill a pass, each with one item for which the memory never suffices."""
    simulation = Simulation(1, 0.0, PASS_TOKENS, oracle={"control_bytes": True})
    source = EqualItems(ITEM_TOKENS, options.seed)
    wrong, errors = 0, 0
    with simulated_server(simulation, options.runtime) as server, RunProgress(Console(stderr=True)) as progress:
        before = {process.pid for process in server.processes("replica")}
        for number in range(REQUESTS):
            progress.tell("requests out of memory", number, REQUESTS)
            items = source.take(ITEMS)
            bad = number % ITEMS
            items[bad] = {**items[bad], "completion": chr(MEMORY_BYTE) + items[bad]["completion"][1:]}
            results = json.loads(score(server.url, items))["results"]
            errors += "error" in results[bad]
            wrong += sum(not is_right(items[index], results[index]) for index in range(ITEMS) if index != bad)
        passes, budget = total(server.url, "rm_oom_total"), total(server.url, "rm_budget_tokens")
        died = len(before - {process.pid for process in server.processes("replica")})
    return [
        Finding("load", f"requests of {ITEMS} items, one of which runs out of memory", REQUESTS),
        at_least("R12", "batches that ran out of memory (rm_oom_total)", passes, REQUESTS),
        at_most("R12", "processes that died", died, 0),
        at_most("R12", "other items without their reward", wrong, 0),
        at_least("R12", "items with an error of their own", errors, REQUESTS),
        at_most("R12", "tokens of a pass afterwards", budget, PASS_TOKENS // 2),
    ]
