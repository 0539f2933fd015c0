"""Single items, each on a TCP connection of its own, as OpenRLHF and verl send them."""

from __future__ import annotations

import pytest

from loadtest.connection_cost import WIRE, measure, throughput_ratio

pytestmark = pytest.mark.slow

IN_FLIGHT, NUM_ITEMS, ROUNDS = 256, 768, 3
FLOOR = 0.6
"""Least throughput, relative to persistent connections. The target is 0.8; the rest is noise of a busy machine."""


def test_a_connection_for_each_item_costs_little(server_url: str) -> None:
    """256 in flight: no connection is refused, every item gets a reward, and throughput is nearly that of keep-alive.

    The oracle computes nothing, so connections are the largest share of the time that they can be.
    """
    bodies = [WIRE.body([{"prompt": "a ", "completion": f"text {number}"}]) for number in range(NUM_ITEMS)]

    passes = list(measure(server_url, bodies, IN_FLIGHT, ROUNDS))

    assert throughput_ratio(passes) >= FLOOR
