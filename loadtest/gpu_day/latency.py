"""Measures the latency of single requests over HTTP at no other load, with and without CUDA graphs, by stage."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from loadtest.generator import LoadRun, send_all
from loadtest.servers import running_service
from loadtest.wire import NATIVE
from loadtest.workload import WORKLOADS, cut_into_requests
from service.outputs import write_text

WORK = ("short", "independent", "512 tokens")
WARM_UP = 10
SEED = 1


@dataclass(frozen=True, slots=True)
class Latency:
    """The latencies of one kind of work, one request at a time."""

    graphs: str
    """The setting ``model.cuda_graphs``."""

    work: str
    num_requests: int

    tokens: float
    """Median of the tokens of an item."""

    p50_ms: float
    p99_ms: float

    stages_ms: dict[str, float]
    """Medians of the stages that the service reports."""


def main() -> int:
    """Measure; the file is written after each server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows: list[Latency] = []
    for graphs in ("false",) if options.device == "cpu" else ("false", "true"):
        rows += measure(options.model, options.device, graphs, options.requests)
        write_text(options.json, json.dumps({"rows": [asdict(row) for row in rows]}))
    return 0


def measure(model: Path, device: str, graphs: str, num_requests: int) -> list[Latency]:
    """Start a server without Ray, send requests one after the other, and return the latencies of each kind of work."""
    settings = ("--runtime", "local", "--device", device, "--model.cuda_graphs", graphs)
    with (
        tempfile.TemporaryDirectory(prefix="reward-latency-") as logs,
        running_service(model, "auto", Path(logs), *settings) as server,
    ):
        return [_measure_work(server.url, work, graphs, num_requests) for work in WORK]


def _measure_work(url: str, work: str, graphs: str, num_requests: int) -> Latency:
    groups = WORKLOADS[work].draw(WARM_UP + num_requests, SEED)
    bodies = [NATIVE.body(request) for request in cut_into_requests(groups, 1)]
    send_all(url, bodies[:WARM_UP], 1)
    return summarize(send_all(url, bodies[WARM_UP:], 1), work, graphs)


def summarize(run: LoadRun, work: str, graphs: str) -> Latency:
    """Return the figures of a run.

    Raises:
        UnexpectedAnswer: a request got no reward.
    """
    num_requests = len(run.rewards)
    answers: list[dict[str, Any]] = [json.loads(reply.content) for reply in run.replies]
    stages = answers[0]["timings_ms"]
    return Latency(
        graphs=graphs,
        work=work,
        num_requests=num_requests,
        tokens=median(answer["usage"]["scored_tokens"] for answer in answers),
        p50_ms=run.latency_s(0.5) * 1e3,
        p99_ms=run.latency_s(0.99) * 1e3,
        stages_ms={stage: median(answer["timings_ms"][stage] for answer in answers) for stage in stages},
    )


if __name__ == "__main__":
    sys.exit(main())
