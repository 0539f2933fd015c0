"""Single items, each on a TCP connection of its own, as OpenRLHF and verl send them."""

from __future__ import annotations

import psutil
import pytest
from serving import RunningServer

from loadtest.connection_cost import WIRE, cpu_ratio, measure

pytestmark = pytest.mark.slow

IN_FLIGHT, NUM_ITEMS, ROUNDS = 256, 768, 3
FLOOR = 0.3
"""Least share of the throughput of persistent connections. With a model, which costs CPU time too, it is nearly 1; with
the oracle 0.55 was measured on a busy machine."""


def test_a_connection_for_each_item_costs_little(oracle_server: RunningServer) -> None:
    """256 in flight: no connection is refused, each item gets a reward, and the CPU time is bounded.

    The oracle computes nothing, so connections are the largest share of the CPU time that they can be.
    """
    bodies = [WIRE.body([{"prompt": "a ", "completion": f"text {number}"}]) for number in range(NUM_ITEMS)]
    on_the_path = request_path(oracle_server)

    def cpu_s() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in on_the_path)

    passes = list(measure(oracle_server.url, bodies, IN_FLIGHT, ROUNDS, cpu_s))

    assert cpu_ratio(passes) >= FLOOR


def request_path(server: RunningServer) -> list[psutil.Process]:
    """The processes that a request passes: HAProxy and the replica, or the local runtime."""
    if server.runtime == "local":
        return [psutil.Process(server.process.pid)]
    names = ("haproxy", "ray::ServeReplica")
    found = [process for process in server.descendants() if process.cmdline()[:1]]
    found = [process for process in found if process.cmdline()[0].rsplit("/", 1)[-1].startswith(names)]
    assert len(found) >= 2
    return found
