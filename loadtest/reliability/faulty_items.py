"""Items that make the engine raise or give NaN: they fail alone, and nothing that is not finite is ever returned."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from loadtest.reliability.findings import Finding, at_most
from loadtest.reliability.options import ExperimentOptions
from loadtest.simulated_server import Simulation, simulated_server
from loadtest.traffic.items import EqualItems, Item
from service.engines.oracle import INFINITY_BYTE, NAN_BYTE, RAISE_BYTE, oracle_reward_of_text

ITEMS = 256
REQUESTS_OF_A_KIND = 8
KINDS = {"raise": RAISE_BYTE, "nan": NAN_BYTE, "infinity": INFINITY_BYTE}
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def faulty_items(options: ExperimentOptions) -> list[Finding]:
    """R10, R11: one bad item among 256, at several positions, for each kind of fault."""
    simulation = Simulation(1, 0.0, 65_536, oracle={"control_bytes": True})
    failed_good, answered_bad, not_finite = 0, 0, 0
    source = EqualItems(64, options.seed)
    with simulated_server(simulation) as server:
        before = server.processes("replica")
        for byte in KINDS.values():
            for number in range(REQUESTS_OF_A_KIND):
                items = source.take(ITEMS)
                bad = number * (ITEMS - 1) // (REQUESTS_OF_A_KIND - 1)
                items[bad] = {**items[bad], "completion": items[bad]["completion"] + chr(byte)}
                constants: list[str] = []
                results = json.loads(_post(server.url, items), parse_constant=constants.append)["results"]
                not_finite += len(constants) + sum("reward" in one and one["reward"] is None for one in results)
                failed_good += sum(
                    not _is_right(items[index], results[index]) for index in range(ITEMS) if index != bad
                )
                answered_bad += "reward" in results[bad]
        restarts = len({process.pid for process in server.processes("replica")} ^ {one.pid for one in before})
    return [
        Finding("load", "requests of 256 items with one bad", len(KINDS) * REQUESTS_OF_A_KIND),
        at_most("R11", "good items without their reward", failed_good, 0),
        at_most("R10", "bad items with a reward", answered_bad, 0),
        at_most("R10", "numbers in answers that are not finite, and rewards that are null", not_finite, 0),
        at_most("R11", "replicas replaced", restarts, 0),
    ]


def _post(url: str, items: list[Item]) -> bytes:
    body = json.dumps({"items": items}).encode()
    request = urllib.request.Request(f"{url}/v1/score", body, {"Content-Type": "application/json"})  # noqa: S310
    with _DIRECT.open(request, timeout=60.0) as answer:
        content: bytes = answer.read()
        return content


def _is_right(item: Item, result: dict[str, Any]) -> bool:
    return bool(result.get("reward") == oracle_reward_of_text(item["prompt"], item["completion"]))
