"""Puts a server without Ray under full load for some time: single items, then requests of 64 items in groups of 8.

The texts repeat once all have been sent, so the prefix cache between passes is off.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.generator import LoadRun, send_for
from loadtest.servers import RunningServer, running_service
from loadtest.wire import NATIVE
from loadtest.workload import WORKLOADS, cut_into_requests
from service.outputs import write_text

SEED = 1
WARM_UP_SHARE = 0.1
"""Of the time of a phase, before it and not counted."""


@dataclass(frozen=True, slots=True)
class Phase:
    """How requests are sent."""

    name: str
    items_per_request: int
    num_connections: int


ITEMS_PER_REQUEST = 64


def phases(num_connections: int) -> tuple[Phase, ...]:
    """Return the phases: single items on these connections, and larger requests on a sixteenth of them."""
    bulk = Phase(f"{ITEMS_PER_REQUEST} items a request", ITEMS_PER_REQUEST, max(1, num_connections // 16))
    return Phase("single items", 1, num_connections), bulk


@dataclass(frozen=True, slots=True)
class Load:
    """The figures of a phase."""

    phase: str
    connections: int
    seconds: float
    num_requests: int
    num_failed: int
    items_per_s: float
    tokens_per_s: float
    shared_share: float
    """Part of the tokens that was computed for another item of the pass."""
    p50_ms: float
    p99_ms: float
    server_cores: float
    """CPU seconds of the server a second."""
    client_cores: float
    """CPU seconds of the generator a second."""


def main() -> int:
    """Measure; the exit status is 1 where a request got no reward."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--items", type=int, required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows: list[Load] = []
    settings = ("--runtime", "local", "--device", options.device, "--prefix-cache-mib", "0")
    with (
        tempfile.TemporaryDirectory(prefix="reward-load-") as logs,
        running_service(options.model, "auto", Path(logs), *settings) as server,
    ):
        planned = phases(options.connections)
        for phase in planned:
            rows.append(measure(server, phase, options.items, options.seconds / len(planned)))
            write_text(options.json, json.dumps({"rows": [asdict(row) for row in rows]}))
    return int(any(row.num_failed for row in rows))


def measure(server: RunningServer, phase: Phase, num_items: int, seconds: float) -> Load:
    """Send requests for some seconds and return the figures."""
    groups = WORKLOADS["groups of 8"].draw(num_items, SEED)
    shuffle = SEED if phase.items_per_request == 1 else None
    bodies = [NATIVE.body(request) for request in cut_into_requests(groups, phase.items_per_request, shuffle)]
    send_for(server.url, bodies, phase.num_connections, WARM_UP_SHARE * seconds)
    before = server.cpu_s()
    run = send_for(server.url, bodies, phase.num_connections, seconds)
    return summarize(run, phase, server.cpu_s() - before)


def summarize(run: LoadRun, phase: Phase, server_cpu_s: float) -> Load:
    """Return the figures of a run; a request counts as failed unless all its items have rewards."""
    answers: Sequence[dict[str, Any]] = [json.loads(reply.content) for reply in run.replies if reply.status == 200]
    rewarded = [answer for answer in answers if not any("error" in result for result in answer["results"])]
    tokens = sum(answer["usage"]["scored_tokens"] for answer in answers)
    shared = sum(answer["usage"]["shared_tokens"] for answer in answers)
    return Load(
        phase=phase.name,
        connections=phase.num_connections,
        seconds=run.wall_s,
        num_requests=len(run.replies),
        num_failed=len(run.replies) - len(rewarded),
        items_per_s=sum(len(answer["results"]) for answer in rewarded) / run.wall_s,
        tokens_per_s=tokens / run.wall_s,
        shared_share=shared / max(tokens, 1),
        p50_ms=run.latency_s(0.5) * 1e3,
        p99_ms=run.latency_s(0.99) * 1e3,
        server_cores=server_cpu_s / run.wall_s,
        client_cores=run.cpu_s / run.wall_s,
    )


if __name__ == "__main__":
    sys.exit(main())
