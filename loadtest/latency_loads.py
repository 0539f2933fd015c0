"""The loads of ``loadtest.latency`` for single items: one at a time, as many as possible, and a share of that.

They are sent to a running service; nothing is started here.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from loadtest.connection import Address, Connection
from loadtest.generator import LoadRun, Reply, send_for
from loadtest.load_shapes import NUM_CONNECTIONS
from loadtest.stage_latencies import BEYOND, CLIENT, FORWARD, StageLatencies, stage_latencies
from loadtest.traffic.arrivals import Arrivals
from loadtest.traffic.execution import Executor, PhaseRun
from loadtest.traffic.items import WorkloadItems
from loadtest.traffic.phases import OpenStream, Phase, RequestPlanner
from loadtest.wire import NATIVE, UnexpectedAnswer
from loadtest.workload import WORKLOADS, cut_into_requests

WARM_UP = 20
"""Requests that are not counted, and passes."""

IDLE_S = 0.02
"""Pause between a pass and a request, so that the threads of one process no longer spin when the other computes."""

MOST_BODIES = 8192
"""Texts of the measurement of capacity, which repeat after so many."""


def latencies_one_at_a_time(url: str, options: argparse.Namespace, forward_s: Callable[[int], float]) -> StageLatencies:
    """Send single items over one connection, each after the answer to the one before, beside the pass over each.

    Args:
        url: of the service.
        options: of the command.
        forward_s: computes the forward pass of the item of a number without the service, and returns its seconds.

    Returns:
        Besides the service's stages the forward pass of the same items, and how much longer each client waited. Pass
        and request alternate, and so does which is first, because a machine's speed changes with time.

    Raises:
        UnexpectedAnswer: a request got no reward.
    """
    bodies = _bodies(options, WARM_UP + options.requests, options.seed)
    passes_s, replies = asyncio.run(_alternate(url, bodies, forward_s))
    _ = LoadRun(replies, NATIVE, 0.0, 0.0).rewards  # every request must have one
    counted = replies[WARM_UP:]
    found = stage_latencies("one at a time", ((reply.content, reply.latency_s) for reply in counted))
    more_s = [reply.latency_s - pass_s for reply, pass_s in zip(counted, passes_s[WARM_UP:], strict=True)]
    return replace(found, seconds={FORWARD: passes_s[WARM_UP:], **found.seconds, BEYOND: more_s})


async def _alternate(
    url: str, bodies: Sequence[bytes], forward_s: Callable[[int], float]
) -> tuple[list[float], tuple[Reply, ...]]:
    address = Address.of(url)
    connection = Connection(address, address.tls_context())
    passes_s, replies = [], []
    try:
        for number, body in enumerate(bodies):
            for is_pass in (True, False) if number % 2 else (False, True):
                await asyncio.sleep(IDLE_S)
                if is_pass:
                    passes_s.append(forward_s(number))
                else:
                    sent = time.perf_counter()
                    response = await connection.send(address.post(NATIVE.path, body))
                    replies.append(Reply(response.status, response.content, time.perf_counter() - sent))
    finally:
        connection.close()
    return passes_s, tuple(replies)


def capacity_per_s(url: str, options: argparse.Namespace, alone: StageLatencies) -> float:
    """Return the items per second over 32 connections that send their next item after the answer to the last.

    Raises:
        UnexpectedAnswer: a request got no reward.
    """
    most = options.capacity_s * NUM_CONNECTIONS / (alone.quantile_ms(CLIENT, 0.5) / 1e3)
    bodies = _bodies(options, min(MOST_BODIES, max(NUM_CONNECTIONS, round(most))), options.seed + 1)
    sent = send_for(url, bodies, NUM_CONNECTIONS, options.capacity_s)
    return len(sent.rewards) / sent.wall_s


def latencies_under_load(url: str, options: argparse.Namespace, capacity: float) -> StageLatencies:
    """Send single items at the times of a Poisson process; latencies count from these times.

    Raises:
        UnexpectedAnswer: no request got a reward.
    """
    rate = options.load * capacity
    phase = Phase("load", options.load_s, [OpenStream("single items", Arrivals(rate))])
    planner = RequestPlanner(
        WorkloadItems(WORKLOADS[options.workload], options.seed + 2), timeout_ms=None, seed=options.seed
    )
    done = asyncio.run(_send(url, phase, planner))
    good = [(one.content, one.latency_s) for one in done.exchanges if one.status == 200 and _has_reward(one.content)]
    if not good:
        raise UnexpectedAnswer(f"None of {len(done.exchanges)} requests under load got a reward")
    return stage_latencies(f"{options.load:.0%} of capacity", good, rate, len(done.exchanges) - len(good))


async def _send(url: str, phase: Phase, planner: RequestPlanner) -> PhaseRun:
    executor = Executor(Address.of(url))
    try:
        return await executor.run(phase, planner.schedule(phase, 0), planner)
    finally:
        executor.close()


def _has_reward(content: bytes) -> bool:
    try:
        return bool(NATIVE.rewards(content))
    except UnexpectedAnswer:
        return False


def _bodies(options: argparse.Namespace, num_items: int, seed: int) -> list[bytes]:
    groups = WORKLOADS[options.workload].draw(num_items, seed)
    return [NATIVE.body(request) for request in cut_into_requests(groups, 1)]
