"""The reliability experiments: what their figures are computed from, and that their command names what it measures."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from misbehaving_server import FakeServer, Request, ok, running

from loadtest.reliability.command import EXPERIMENTS, main
from loadtest.reliability.findings import Finding, at_least, at_most, table, write_findings
from loadtest.reliability.ledger import Ledger, keep_ledger
from loadtest.reliability.memory import slope_of
from service.engines.oracle import oracle_reward_of_text


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


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """The names of those that exist are given."""
    with pytest.raises(SystemExit):
        main(["overheating"])

    error = capsys.readouterr().err
    assert all(name in error for name in EXPERIMENTS)
