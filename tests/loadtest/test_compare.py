"""The comparison: its arithmetic by hand, its generator against a real socket, and once the whole command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from misbehaving_server import Request, World, ok, problem, response, running

from loadtest.compare import Agreement, Measurement, compare_rewards, ranks, ratios
from loadtest.generator import UnexpectedAnswer, send_all
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint


def measured(server: str, round_: int, items_per_s: float, rewards: list[float]) -> Measurement:
    return Measurement(server, "single", round_, items_per_s, 0.1, 0.2, 2.0, 0.0, 0.0, rewards)


def test_ratio_is_ours_over_plain_of_the_same_round() -> None:
    """Rounds are paired by number, whatever the order in which they were measured."""
    found = [
        measured("plain", 0, 10, []),
        measured("ours", 1, 60, []),
        measured("plain", 1, 20, []),
        measured("ours", 0, 40, []),
    ]

    assert ratios(found, "single") == [4.0, 3.0]


def test_ranks_share_the_mean_among_equals() -> None:
    """Ranks as Spearman's coefficient needs them."""
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_agreement_is_computed_over_all_rounds() -> None:
    """Difference, spread and rank correlation of a case worked out by hand."""
    found = [
        measured("plain", 0, 1, [0.0, 1.0]),
        measured("ours", 0, 1, [0.0, 1.5]),
        measured("plain", 1, 1, [2.0, 3.0]),
        measured("ours", 1, 1, [3.5, 2.5]),
    ]

    agreement = compare_rewards(found)

    assert (agreement.num_items, agreement.max_difference) == (4, 1.5)
    assert agreement.spread == pytest.approx(math.sqrt(1.25))
    # One swap of neighbours among four: 1 - 6 x 2 / (4 x 15).
    assert agreement.spearman == pytest.approx(0.8)
    assert not agreement.holds("bfloat16")


@pytest.mark.parametrize(
    ("dtype", "max_difference", "spearman", "agrees"),
    [
        ("float32", 1e-6, 1.0, True),
        ("float32", 1e-2, 1.0, False),
        ("bfloat16", 1e-2, 0.999, True),
        ("bfloat16", 1e-2, 0.9, False),
        ("bfloat16", 0.5, 0.999, False),
    ],
)
def test_rounding_is_forgiven_and_nothing_else(
    dtype: str, max_difference: float, spearman: float, agrees: bool
) -> None:
    """fp32 must be equal to a few digits, 16 bits to their rounding, both in rank."""
    agreement = Agreement(num_items=100, max_difference=max_difference, spread=0.5, spearman=spearman)

    assert agreement.holds(dtype) is agrees


def test_replies_stand_in_the_order_of_the_requests_and_connections_are_kept() -> None:
    """Whatever answers first, replies are those of their requests, and only so many connections are used."""

    class Counting(World):
        """Rewards are prompt numbers; counts its connections."""

        connections = 0

        async def serve(self, reader, writer) -> None:
            self.connections += 1
            await super().serve(reader, writer)

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield ok({"results": [{"reward": float(item["prompt"])} for item in request.body["items"]]})

    bodies = [json.dumps({"items": [{"prompt": str(number)}]}).encode() for number in range(40)]
    with running(Counting()) as world:
        run = send_all(world.url, bodies, num_connections=4)

    assert run.rewards == list(range(40))
    assert world.connections == 4
    assert 0 < run.latency_s(0.5) <= run.latency_s(0.95) <= run.wall_s


@pytest.mark.parametrize(
    "said",
    [
        problem("503 Service Unavailable", "overloaded"),
        ok({"results": [{"error": {}}]}),
        response("200 OK", b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""),
    ],
    ids=["not-a-200", "item-error", "no-length"],
)
def test_anything_but_rewards_ends_the_measurement(said: bytes) -> None:
    """A fast refusal must never count as fast scoring."""

    class Saying(World):
        """Says one thing."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield said

    with running(Saying()) as world, pytest.raises(UnexpectedAnswer):
        _ = send_all(world.url, [b'{"items": []}'], num_connections=1).rewards


@pytest.mark.slow
def test_the_command_measures_both_servers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """End to end on a tiny model: rewards agree, every figure is there, and both servers are gone afterwards."""
    tiny = ModelShape(vocabulary=1024, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, positions=4096)
    model = write_random_checkpoint(tmp_path / "tiny", tiny, dtype="float32")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "loadtest.compare", "--model", model, "--dtype", "float32", "--rounds", "1"]
    command += ["--single-groups", "4", "--bulk-groups", "2", "--json", report]

    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(report.read_text())
    assert said["agreement"]["agrees"]
    assert said["agreement"]["num_items"] == 4 * 8 + 2 * 2 * 8
    assert all(shape["ratio"] > 0 for shape in said["shapes"])
    assert {(one["server"], one["shape"]) for one in said["measurements"]} == {
        (server, shape) for server in ("plain", "ours") for shape in ("single", "bulk", "bulk shuffled")
    }
    assert not [process for process in Path("/proc").glob("[0-9]*") if _mentions(process, str(model))]


def _mentions(process: Path, text: str) -> bool:
    try:
        return text in (process / "cmdline").read_text()
    except OSError:
        return False
