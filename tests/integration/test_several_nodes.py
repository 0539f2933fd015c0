"""Four replicas on four Ray nodes of this machine, with an oracle whose passes take as long as a model's."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ray_cluster import RunningCluster, application, running_cluster
from reward_client import AsyncRewardClient, ChunkLimits, RewardClient
from serving import eventually

from service.engines.oracle import oracle_reward_of_text

pytestmark = [pytest.mark.slow, pytest.mark.soak]

SECONDS_PER_TOKEN = 60e-6
"""Of the simulated forward pass; 16,667 tokens/s for each replica."""
SETTINGS: dict[str, Any] = {
    "oracle": {"seconds_per_token": SECONDS_PER_TOKEN},
    "batching": {"max_batch_tokens": 2048},
    "scatter": {"min_tokens": 4096},
}
GROUP_SIZE = 8
MIN_SPEEDUP = 3.0
"""Of four replicas over one. Decision 0022 has measured figures; on a busy machine the parts that are not simulated are
short of processor time, and more so the faster the replicas are."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """The same application with one replica and with four, which have a node each."""
    applications = (application("one", 1, **SETTINGS), application("four", 4, **SETTINGS))
    with running_cluster(tmp_path_factory.mktemp("cluster"), *applications, nodes=4) as running:
        yield running


def texts(num_items: int, label: str, words: int = 8) -> tuple[list[str], list[str]]:
    """Prompts and completions in groups of eight; no two calls with different labels share one."""
    prompts = [f"{label}: question {number // GROUP_SIZE:06d}? " for number in range(num_items)]
    return prompts, [f"answer {number:06d} " + "word " * (words + number % 17) for number in range(num_items)]


def expected(prompts: list[str], completions: list[str]) -> list[float]:
    return [oracle_reward_of_text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def seconds_of_one_request(url: str, label: str) -> float:
    """Time one request of 1,024 items and check its rewards."""
    prompts, completions = texts(1024, label)
    with RewardClient(url, deadline_s=120, chunks=ChunkLimits(max_items=2048)) as client:
        begin = time.perf_counter()
        rewards = client.score(prompts, completions)
        seconds = time.perf_counter() - begin
    assert rewards == expected(prompts, completions)
    return seconds


def test_one_large_request(cluster: RunningCluster) -> None:
    """One request of 1,024 items finishes at least 3 times as fast on four replicas as on one, every reward right."""
    seconds_of_one_request(f"{cluster.url}/four", "warm-up")
    one = min(seconds_of_one_request(f"{cluster.url}/one", f"one {run}") for run in range(2))
    four = min(seconds_of_one_request(f"{cluster.url}/four", f"four {run}") for run in range(4))

    print(f"1,024 items: one replica {one:.2f} s, four replicas {four:.2f} s: {one / four:.2f}x")
    assert one / four >= MIN_SPEEDUP


async def items_per_s(url: str, label: str, callers: int, seconds: float = 8.0) -> float:
    """Score groups of eight from so many callers for so many seconds; return the items answered per second."""
    answered = 0
    begin = time.perf_counter() + 2.0  # the first seconds are not counted
    numbers = itertools.count()

    async def work(client: AsyncRewardClient) -> None:
        nonlocal answered
        while time.perf_counter() < begin + seconds:
            # Long texts: the processor time of a request must stay small beside its simulated forward pass.
            prompts, completions = texts(GROUP_SIZE, f"{label} {next(numbers)}", words=40)
            rewards = await client.score(prompts, completions)
            assert rewards == expected(prompts, completions)
            if begin <= time.perf_counter() <= begin + seconds:
                answered += len(rewards)

    async with AsyncRewardClient(url, deadline_s=120, max_connections=callers) as client:
        await asyncio.gather(*(work(client) for _ in range(callers)))
    return answered / seconds


async def test_independent_load(cluster: RunningCluster) -> None:
    """Independent small requests are answered at least 3 times as fast by four replicas as by one."""
    # With as many callers for one replica as for four, an answer would take about as long as the measurement.
    one = await items_per_s(f"{cluster.url}/one", "load one", callers=12)
    four = await items_per_s(f"{cluster.url}/four", "load four", callers=48)

    print(f"groups of 8: one replica {one:.0f} items/s, four replicas {four:.0f} items/s: {four / one:.2f}x")
    assert MIN_SPEEDUP <= four / one < 6.0  # above it one replica was not measured in its steady state


async def test_a_node_is_killed_under_load(cluster: RunningCluster) -> None:
    """A node that dies while large and small requests run costs no answer: each one comes once, and is right."""
    url = f"{cluster.url}/four"
    killed = asyncio.Event()

    async def work(client: AsyncRewardClient, size: int, caller: int) -> int:
        calls = after = 0
        while after < 2:
            after += killed.is_set()
            prompts, completions = texts(size, f"kill {caller} {calls}")
            assert await client.score(prompts, completions) == expected(prompts, completions)
            calls += 1
        return calls * size

    async with AsyncRewardClient(url, deadline_s=120, max_connections=32, chunks=ChunkLimits(max_items=2048)) as client:
        callers = [asyncio.create_task(work(client, size, number)) for number, size in enumerate([512] * 2 + [8] * 14)]
        await asyncio.sleep(3)
        await asyncio.to_thread(cluster.kill_node, 3)
        await asyncio.sleep(1)
        killed.set()
        num_items = sum(await asyncio.gather(*callers))

    print(f"{num_items} items from 16 callers, a node killed meanwhile: all rewards right")
    assert await asyncio.to_thread(eventually, lambda: "kill 3\n" in cluster.messages.read_text(), 30)
    assert await asyncio.to_thread(eventually, lambda: are_complete(cluster), 90)  # for the other tests


def are_complete(cluster: RunningCluster) -> bool:
    """Whether all replicas of both applications run."""
    return (cluster.num_running("one"), cluster.num_running("four")) == (1, 4)
