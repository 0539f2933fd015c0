"""Two servers on loopback are measured alternately and get the same requests."""

from __future__ import annotations

import psutil
import pytest
from misbehaving_server import FakeServer, ok, running

from loadtest.load_shapes import Pass, passes, shapes_against_plain
from loadtest.server_rounds import Measurement, measure_alternately
from loadtest.servers import RunningServer


class Lengths(FakeServer):
    """The reward of an item is the length of its completion."""

    async def answer(self, request):
        yield ok({"results": [{"reward": float(len(item["completion"]))} for item in request.body["items"]]})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Pass], list[Measurement], list[FakeServer]]:
    """Measure two rounds of two small shapes, without waiting for servers that poll."""
    monkeypatch.setattr("loadtest.server_rounds.QUIET_FOR_S", 0.0)
    planned = list(passes(shapes_against_plain(1, 1)[:2], rounds=2, seed=1))
    with running(Lengths()) as peer, running(Lengths()) as ours:
        servers = (
            RunningServer("plain", peer.url, psutil.Process()),
            RunningServer("ours", ours.url, psutil.Process()),
        )
        return planned, list(measure_alternately(servers, planned)), [peer, ours]


def test_the_server_that_is_first_alternates(measured: tuple[list[Pass], list[Measurement], list[FakeServer]]) -> None:
    """Each pass is sent to both servers in turn; the one that was first is second in the next round."""
    _, found, _ = measured

    assert [(one.round, one.shape, one.server) for one in found] == [
        (0, "single", "plain"),
        (0, "single", "ours"),
        (0, "bulk", "plain"),
        (0, "bulk", "ours"),
        (1, "single", "ours"),
        (1, "single", "plain"),
        (1, "bulk", "ours"),
        (1, "bulk", "plain"),
    ]


def test_both_get_the_same_items_and_rewards_are_in_their_order(
    measured: tuple[list[Pass], list[Measurement], list[FakeServer]],
) -> None:
    """The rewards that are compared item by item belong to the same items."""
    planned, found, worlds = measured

    sent = [len(item["completion"]) for one_pass in planned for item in one_pass.items]
    for server in ("plain", "ours"):
        assert [reward for one in found if one.server == server for reward in one.rewards] == sent
    requests = [sorted(str(request.body) for request in world.requests) for world in worlds]
    assert requests[0] == requests[1]
    assert all(one.items_per_s > 0 and 0 < one.latency_p50_s <= one.latency_p95_s for one in found)
