"""The reliability experiments: what their figures are computed from, and that their command names what it measures."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from misbehaving_server import FakeServer, Request, ok, response, running
from tiny_models import write_tiny_checkpoint

from loadtest.reliability.command import EXPERIMENTS, main
from loadtest.reliability.damaged_checkpoints import DAMAGES
from loadtest.reliability.findings import Finding, at_least, at_most, table, write_findings
from loadtest.reliability.ledger import Ledger, keep_ledger
from loadtest.reliability.memory import slope_of
from loadtest.reliability.served_metrics import p99_of_refusals_s, total
from service.checkpoints.checkpoint import open_checkpoint
from service.engines.oracle import oracle_reward_of_text
from service.errors import StartupError
from service.settings import ModelSettings


def test_a_figure_keeps_or_misses_its_bound(tmp_path: Path) -> None:
    """Bounds are inclusive, infinity misses an upper one, and the file says of each figure whether it holds."""
    findings = [at_least("R1", "share", 0.9, 0.9), at_most("R4", "seconds", math.inf, 5.0), Finding("load", "items", 7)]

    write_findings(tmp_path / "found.json", "overload", {"cpu": "a CPU"}, 1.0, findings)

    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["holds"] for one in found["findings"]] == [True, False, True]
    assert found["findings"][1]["value"] is None
    assert table(findings).row_count == 3


def test_the_slope_of_a_line() -> None:
    """Memory that grows by 3 MB for each million items has the slope 3e-6."""
    assert slope_of([(number * 1000, 50 + 3e-6 * number * 1000) for number in range(10)]) == pytest.approx(3e-6)


class Oracle(FakeServer):
    """The oracle, which gives the third item of each request the reward of another text if it is told to."""

    lies = False

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        items = request.body["items"]
        rewards = [oracle_reward_of_text(item["prompt"], item["completion"]) for item in items]
        if self.lies:
            rewards[2] = oracle_reward_of_text("another", "text")
        results = [
            {"index": index, "id": item["id"], "reward": reward}
            for index, (item, reward) in enumerate(zip(items, rewards, strict=True))
        ]
        yield ok({"model": {"name": "oracle", "version": "oracle"}, "results": results})


@pytest.mark.parametrize("lies", [False, True])
def test_the_ledger_accounts_for_every_item(lies: bool) -> None:
    """All items are answered once; rewards of other texts are counted, one for each request of five."""
    server = Oracle()
    server.lies = lies
    with running(server) as world:
        ledger = asyncio.run(keep_ledger(world.url, 43, clients=3, items_per_call=5, item_bytes=40))

    assert (ledger.lost, ledger.duplicated, ledger.errors.total()) == (0, 0, 0)
    assert ledger.wrong == (9 if lies else 0)
    assert sum(ledger.answers.values()) == 43


def test_the_ledger_sees_loss_and_repetition() -> None:
    """An item without an answer is lost, and one with two is duplicated."""
    ledger = Ledger(3)
    ledger.answers.update(["item-0", "item-1", "item-1"])

    assert (ledger.lost, ledger.duplicated) == (1, 1)


METRICS = """\
# HELP rm_items_total Items by outcome.
# TYPE rm_items_total counter
rm_items_total{outcome="ok",replica="a"} 5.0
rm_items_total{outcome="ok",replica="b"} 7.0
rm_items_total{outcome="error",replica="a"} 2.0
"""


def test_a_metric_is_summed_over_the_replicas() -> None:
    """The labels that are given select, all others are summed over."""

    class Metrics(FakeServer):
        """Answers with metrics."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield response("200 OK", METRICS.encode())

    with running(Metrics()) as server:
        assert total(server.url, "rm_items_total", outcome="ok") == 12
        assert total(server.url, "rm_items_total") == 14


def test_refusals_of_the_access_log(tmp_path: Path) -> None:
    """Only answers with status 503 count, and without one there is no figure."""
    log = tmp_path / "requests.jsonl"
    scored = {"event": "scored", "status": 200, "total_s": 9.0}
    log.write_text(json.dumps(scored) + "\n")
    assert math.isnan(p99_of_refusals_s(log))

    refused = [{"event": "answered", "status": 503, "total_s": number / 1000} for number in range(1, 101)]
    log.write_text("".join(json.dumps(line) + "\n" for line in (scored, *refused, {"event": "refused"})))
    assert p99_of_refusals_s(log) == pytest.approx(0.099, rel=0.002)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(damage: str, tmp_path: Path) -> None:
    """Each damage of the experiment makes a checkpoint that was good one that the checks of a start refuse."""
    write_tiny_checkpoint(tmp_path)
    open_checkpoint(tmp_path, ModelSettings())
    DAMAGES[damage](tmp_path)

    with pytest.raises(StartupError):
        open_checkpoint(tmp_path, ModelSettings())


@pytest.mark.slow
def test_an_experiment_without_ray(tmp_path: Path) -> None:
    """Faulty items fail alone on a server that the experiment starts, and the metrics are the client's counts."""
    assert main(["faulty-items", "--runtime", "local", "--items", "1000", "--out", str(tmp_path)]) == 0

    found = json.loads((tmp_path / "faulty-items.json").read_text())
    assert {"R5", "R10", "R11", "R23"} <= {one["goal"] for one in found["findings"]}


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The names of those that exist are given."""
    with pytest.raises(SystemExit):
        main(["overheating"])

    error = capsys.readouterr().err
    assert all(name in error for name in EXPERIMENTS)
