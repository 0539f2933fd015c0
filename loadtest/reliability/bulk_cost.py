"""What HTTP costs a bulk client: throughput over HTTP against that of the pipeline alone, alternately in one run."""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from loadtest.contenders import Setup, changed
from loadtest.engine_work import tokenize
from loadtest.generator import send_all
from loadtest.measuring_process import running
from loadtest.random_checkpoint import write_random_checkpoint
from loadtest.reliability.findings import Finding, at_least
from loadtest.reliability.options import ExperimentOptions
from loadtest.run_progress import RunProgress
from loadtest.servers import running_service
from loadtest.wire import NATIVE
from loadtest.workload import WORKLOADS, Group, cut_into_requests
from service.checkpoints.checkpoint import open_checkpoint
from service.engines.devices.device import resolve_device, resolve_threads
from service.engines.kernels.choice import kernels_for
from service.engines.plan import default_batch_tokens
from service.settings import ModelSettings

ROUNDS = 3
ITEMS_PER_REQUEST = 64
REQUESTS = 16
"""Of a round. While its first one is read and its last one answered the model waits, so a round has to be
long beside them; a job has thousands."""
CONNECTIONS = 2
"""One request is read and tokenized while the other one is computed, as a trainer that sends ahead would have it."""
DTYPE = "float32"
"""All CPUs compute it at full speed."""


def bulk_cost(options: ExperimentOptions) -> list[Finding]:
    """Bulk throughput of a service with one replica over that of its pipeline, on the same texts."""
    with tempfile.TemporaryDirectory(prefix="reward-bulk-") as name, RunProgress(Console(stderr=True)) as progress:
        progress.tell("model, server and pipeline start")
        folder = Path(name)
        model = options.model or write_random_checkpoint(folder / "random", dtype=DTYPE)
        checkpoint = open_checkpoint(model, ModelSettings())
        device = resolve_device("cpu")
        kernels, _ = kernels_for("auto", device, getattr(torch, DTYPE))
        setup = Setup(
            folder=checkpoint.path,
            device=str(device),
            dtype=DTYPE,
            pad_token_id=checkpoint.pad_token_id,
            max_input_tokens=checkpoint.max_input_tokens,
            max_batch_tokens=default_batch_tokens(device, kernels),
            padded_items=1,
            num_threads=resolve_threads(None),
        )
        rounds = [
            WORKLOADS["short"].draw(ITEMS_PER_REQUEST * REQUESTS, options.seed * 100 + number)
            for number in range(ROUNDS + 1)
        ]
        with (
            running(partial(changed), setup, "the pipeline") as pipeline,
            running_service(model, DTYPE, folder, "--runtime", "local", "--device", "cpu") as server,
        ):
            (way,) = pipeline.wait_until_loaded()
            alone, over_http = [], []
            for number, groups in enumerate(rounds):
                work = tokenize(groups, checkpoint)
                progress.tell("the pipeline alone", 2 * number, 2 * len(rounds))
                alone_s = pipeline.score(way, work).seconds
                progress.tell("over HTTP", 2 * number + 1, 2 * len(rounds))
                http_s = _seconds_over_http(server.url, groups)
                if number:  # the first round warms both up
                    alone.append(alone_s)
                    over_http.append(http_s)
    ratios = [one / other for one, other in zip(alone, over_http, strict=True)]
    return [
        Finding("load", "items of a round", ITEMS_PER_REQUEST * REQUESTS),
        Finding("load", "items/s of the pipeline alone", ITEMS_PER_REQUEST * REQUESTS / statistics.median(alone)),
        at_least("load", "throughput over HTTP over that of the pipeline, median", statistics.median(ratios), 0.95),
        Finding("load", "the same, lowest round", min(ratios)),
    ]


def _seconds_over_http(url: str, groups: list[Group]) -> float:
    bodies = [NATIVE.body(items) for items in cut_into_requests(groups, ITEMS_PER_REQUEST)]
    began = time.monotonic()
    run = send_all(url, bodies, CONNECTIONS)
    seconds = time.monotonic() - began
    _ = run.rewards  # raises where an item has none
    return seconds
