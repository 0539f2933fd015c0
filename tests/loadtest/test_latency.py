"""Latencies by stage: the figures are those of hand calculations, and failed requests are left out and counted."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving_server import FakeServer, Request, ok, running
from rich.console import Console

from loadtest.engine_work import tokenize
from loadtest.forward_pass import _engine_alone, _setup
from loadtest.latency import main
from loadtest.latency_loads import WARM_UP, capacity_per_s, latencies_one_at_a_time, latencies_under_load
from loadtest.latency_run import planned_steps
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint
from loadtest.simulated_queue import latencies_one_by_one
from loadtest.stage_latencies import (
    BEYOND,
    CLIENT,
    FORWARD,
    ONE_BY_ONE,
    OUTSIDE,
    TOTAL,
    StageLatencies,
    stage_latencies,
    stage_table,
)
from loadtest.wire import UnexpectedAnswer
from loadtest.workload import WORKLOADS
from service.checkpoints.checkpoint import open_checkpoint
from service.engines.base import EngineOutput
from service.engines.torch import TorchEngine
from service.settings import ModelSettings

TINY = ModelShape(vocabulary=1024, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, positions=4096)
OPTIONS = Namespace(
    workload="short", requests=5, seed=1, capacity_s=0.2, load_s=0.5, load=0.5, runtime=["local", "ray"]
)


class Timed(FakeServer):
    """Answers with the stages that the service reports; every so many requests it has no reward."""

    error_every: int | None = None

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if self.error_every and request.number % self.error_every == 0:
            yield ok({"results": [{"error": {"title": "No"}}], "timings_ms": {}})
        else:
            yield ok({"results": [{"reward": 1.0}], "timings_ms": {"queue": 0.25, "engine": 0.5, "total": 1.0}})


def test_quantiles_are_of_nearest_rank_and_the_rest_is_outside() -> None:
    """What the client waited beyond the service's total is a stage of its own."""
    answers = [(answer({"queue": 2.0, "total": total}), client_s) for total, client_s in ((5.0, 0.006), (7.0, 0.010))]

    found = stage_latencies("load", answers, rate_per_s=3.0, num_failed=1)

    assert list(found.seconds) == ["queue", TOTAL, OUTSIDE, CLIENT]
    assert (found.num_requests, found.num_failed) == (2, 1)
    assert found.quantile_ms(TOTAL, 0.5) == pytest.approx(5.0)
    assert found.quantile_ms(TOTAL, 0.99) == pytest.approx(7.0)
    assert found.quantile_ms(OUTSIDE, 0.5) == pytest.approx(1.0)
    assert found.as_json()["stages_ms"][CLIENT] == {"p50": pytest.approx(6.0), "p99": pytest.approx(10.0)}


def test_the_table_has_a_row_per_stage_and_two_columns_per_load() -> None:
    """A stage that only one load has leaves the other's cells empty."""
    load = stage_latencies("alone", [(answer({"engine": 2.0, "total": 4.0}), 0.005)])
    output = io.StringIO()

    table = stage_table("a title", [load.beside(FORWARD, [0.0015]), load])
    Console(file=output, width=120).print(table)

    rows = [line.split("│")[1].strip() for line in output.getvalue().splitlines() if line.startswith("│")]
    assert rows == ["engine", TOTAL, OUTSIDE, CLIENT, FORWARD]
    assert [list(column.cells)[-1] for column in table.columns] == [FORWARD, "1.50", "1.50", "", ""]


def test_simulated_queue_has_the_mean_of_the_formula() -> None:
    """Equal items of 10 ms at half of the capacity wait 5 ms on average (Pollaczek and Khinchine), and p50 is less."""
    found = StageLatencies("load", {CLIENT: [0.02]}, rate_per_s=50.0)

    latencies = latencies_one_by_one([0.01], 50.0, seed=1)
    shown = stage_table("", [found, found.beside(ONE_BY_ONE, latencies)])

    assert sum(latencies) / len(latencies) == pytest.approx(0.015, rel=0.03)
    assert min(latencies) == pytest.approx(0.01)
    assert [list(column.cells)[-1] for column in shown.columns[:3]] == [ONE_BY_ONE, "", ""]
    assert float(str(list(shown.columns[3].cells)[-1])) < 15.0


def test_requests_one_at_a_time_never_overlap() -> None:
    """A request follows the answer to the last, beside the pass over the same text; the first are not counted."""
    numbers = []
    with running(Timed()) as server:

        def forward_s(number: int) -> float:
            numbers.append(number)
            return 1.0 + number

        found = latencies_one_at_a_time(server.url, OPTIONS, forward_s)

    assert server.max_in_flight == 1
    assert numbers == list(range(WARM_UP + OPTIONS.requests))
    assert found.num_requests == OPTIONS.requests < len(server.requests)
    assert found.quantile_ms("engine", 0.5) == pytest.approx(0.5)
    assert found.seconds[FORWARD] == [1.0 + number for number in numbers[WARM_UP:]]
    assert found.seconds[BEYOND] == pytest.approx(
        [client - forward for client, forward in zip(found.seconds[CLIENT], found.seconds[FORWARD], strict=True)]
    )


def test_a_pass_alone_computes_every_token_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same items are computed beside each runtime, so the engine without a server caches no prefixes."""
    checkpoint = open_checkpoint(write_random_checkpoint(tmp_path / "tiny", TINY, dtype="float32"), ModelSettings())
    outputs: list[EngineOutput] = []
    forward = TorchEngine.forward

    def recorded(engine: TorchEngine, *inputs: Any, **named: Any) -> EngineOutput:
        outputs.append(forward(engine, *inputs, **named))
        return outputs[-1]

    monkeypatch.setattr(TorchEngine, "forward", recorded)
    work = tokenize(WORKLOADS["independent"].draw(1, 0), checkpoint)
    way = _engine_alone(_setup(checkpoint, "float32"))[FORWARD]
    outcomes = [way(work), way(work)]

    assert work.sequences[0].num_prompt_tokens
    assert [output.cached_tokens for output in outputs] == [0, 0]
    assert outcomes[0].rewards == outcomes[1].rewards


def test_the_load_is_a_share_of_the_measured_capacity() -> None:
    """The rate of the Poisson process is half of what the server answered under full load."""
    with running(Timed()) as server:
        capacity = capacity_per_s(server.url, OPTIONS, latencies_one_at_a_time(server.url, OPTIONS, lambda _: 0.0))
        found = latencies_under_load(server.url, OPTIONS, capacity=100.0)

    assert capacity > 0
    assert found.rate_per_s == 50.0
    assert 10 <= found.num_requests <= 45
    assert found.num_failed == 0


def test_requests_without_a_reward_are_counted_and_left_out() -> None:
    """Under load a failed request has no stages; where all fail, there is nothing to report."""
    server = Timed()
    server.error_every = 2
    with running(server):
        found = latencies_under_load(server.url, OPTIONS, capacity=100.0)
        server.error_every = 1
        with pytest.raises(UnexpectedAnswer, match="None of"):
            latencies_under_load(server.url, OPTIONS, capacity=100.0)

    assert 0 < found.num_failed <= found.num_requests + 1


def test_the_run_time_is_estimated_from_the_options() -> None:
    """Every runtime adds its start and its three loads; the times that options give count in full."""
    steps = planned_steps(OPTIONS)

    assert len(steps) == 1 + 4 * len(OPTIONS.runtime)
    assert sum(seconds for title, seconds in steps if "capacity" in title) == pytest.approx(2 * (0.2 + 0.5))


def test_an_unknown_runtime_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends before anything is started."""
    with pytest.raises(SystemExit) as ended:
        main(["--runtime", "triton"])

    assert ended.value.code == 2
    assert "--runtime" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_measures_the_service(tmp_path: Path) -> None:
    """End to end on a tiny model without Ray: all stages of both loads are there, and no request failed."""
    model = write_random_checkpoint(tmp_path / "tiny", TINY, dtype="float32")
    file = tmp_path / "report.json"
    command = [sys.executable, "-m", "loadtest.latency", "--model", str(model), "--json", str(file)]
    command += ["--requests", "10", "--capacity-s", "1", "--load-s", "3"]

    wide = {**os.environ, "COLUMNS": "160"}  # no cell of the table is wrapped
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=wide)

    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(file.read_text())
    (local,) = report["runtimes"]
    assert local["loads"][0]["stages_ms"][FORWARD]["p50"] > 0
    assert local["capacity_per_s"] > 0
    assert [one["num_failed"] for one in local["loads"]] == [0, 0]
    stages = {"parse", "tokenize", "queue", "engine", TOTAL, OUTSIDE, CLIENT}
    assert [load["stages_ms"].keys() for load in local["loads"]] == [{FORWARD, *stages, BEYOND}, {*stages, ONE_BY_ONE}]
    assert "forward pass alone" in done.stdout


def answer(timings_ms: dict[str, float]) -> bytes:
    return json.dumps({"timings_ms": timings_ms}).encode()
