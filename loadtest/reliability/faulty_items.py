"""Items that make the engine raise or give NaN: they fail alone, and nothing that is not finite is ever returned.

Every answer is counted by the client, and the service's metrics must have the same sums.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter

from loadtest.reliability.direct_requests import is_right, score
from loadtest.reliability.findings import Finding, at_most
from loadtest.reliability.ledger import keep_ledger
from loadtest.reliability.options import ExperimentOptions
from loadtest.reliability.served_metrics import total
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.items import EqualItems
from service.engines.oracle import INFINITY_BYTE, NAN_BYTE, RAISE_BYTE

ITEMS = 256
REQUESTS_OF_A_KIND = 8
KINDS = {"raise": RAISE_BYTE, "nan": NAN_BYTE, "infinity": INFINITY_BYTE}
OUTCOME_OF = {"raise": "error", "nan": "non_finite", "infinity": "non_finite"}
"""Label of the items in the metrics."""
ITEM_BYTES, CLIENTS, ITEMS_PER_CALL = 64, 8, 64


def faulty_items(options: ExperimentOptions) -> list[Finding]:
    """R10, R11, R23: one bad item among 256, at several positions, for each kind of fault; then ``items`` good ones."""
    simulation = Simulation(1, 0.0, 65_536, oracle={"control_bytes": True})
    failed_good, answered_bad, not_finite = 0, 0, 0
    source = EqualItems(ITEM_BYTES, options.seed)
    with simulated_server(simulation, options.runtime) as server:
        before = server.processes("replica")
        for byte in KINDS.values():
            for number in range(REQUESTS_OF_A_KIND):
                items = source.take(ITEMS)
                bad = number * (ITEMS - 1) // (REQUESTS_OF_A_KIND - 1)
                items[bad] = {**items[bad], "completion": items[bad]["completion"] + chr(byte)}
                constants: list[str] = []
                results = json.loads(score(server.url, items), parse_constant=constants.append)["results"]
                not_finite += len(constants) + sum("reward" in one and one["reward"] is None for one in results)
                failed_good += sum(not is_right(items[index], results[index]) for index in range(ITEMS) if index != bad)
                answered_bad += "reward" in results[bad]
        ledger = asyncio.run(
            keep_ledger(
                server.url, options.items, clients=CLIENTS, items_per_call=ITEMS_PER_CALL, item_bytes=ITEM_BYTES
            )
        )
        expected = Counter({"ok": len(ledger.answers) + len(KINDS) * REQUESTS_OF_A_KIND * (ITEMS - 1)})
        for kind in KINDS:
            expected[OUTCOME_OF[kind]] += REQUESTS_OF_A_KIND
        counted = {outcome: total(server.url, "rm_items_total", outcome=outcome) for outcome in expected}
        restarts = len({process.pid for process in server.processes("replica")} ^ {one.pid for one in before})
    return [
        Finding("load", "requests of 256 items with one bad", len(KINDS) * REQUESTS_OF_A_KIND),
        at_most("R11", "good items without their reward", failed_good, 0),
        at_most("R10", "bad items with a reward", answered_bad, 0),
        at_most("R10", "numbers in answers that are not finite, and rewards that are null", not_finite, 0),
        at_most("R11", "replicas replaced", restarts, 0),
        Finding("load", "good items through the client afterwards", len(ledger.answers)),
        at_most("R5", "of them lost, wrong or answered twice", ledger.lost + ledger.wrong + ledger.duplicated, 0),
        at_most(
            "R23",
            f"difference of rm_items_total ({', '.join(expected)}) and the client's counts",
            sum(abs(counted[outcome] - expected[outcome]) for outcome in expected),
            0,
        ),
    ]
