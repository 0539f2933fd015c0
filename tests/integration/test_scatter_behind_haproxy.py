"""Large requests of ``reward-serve --replicas 3``: divided behind HAProxy, and complete when a replica is killed."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import Iterator

import httpx2
import psutil
import pytest
from reward_client import AsyncRewardClient, ChunkLimits
from serving import RunningServer, eventually, serving

from service.engines.oracle import oracle_reward_of_text

pytestmark = pytest.mark.slow

NUM_REPLICAS = 3
NUM_ITEMS = 1024
NUM_REQUESTS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """``reward-serve`` with three replicas that have announced themselves to each other."""
    folder = tmp_path_factory.mktemp("haproxy")
    settings = folder / "settings.yaml"
    settings.write_text("scatter: {min_tokens: 20000}")
    options = ("--engine", "oracle", "--config", str(settings), "--replicas", str(NUM_REPLICAS))
    with serving(folder, *options, timeout_s=300) as running:
        yield running


def shards(server: RunningServer, outcome: str) -> float:
    """The shards so far of that outcome, over all replicas that run."""
    answer = httpx2.get(f"{server.url}/metrics", timeout=30.0, trust_env=False)
    pattern = rf'^rm_request_shards_total\{{.*outcome="{outcome}".*\}} (\S+)$'
    return sum(float(value) for value in re.findall(pattern, answer.text, re.MULTILINE))


async def score(client: AsyncRewardClient, label: str) -> None:
    """Score one request of 1,024 items in groups of eight; each reward must be that of its text."""
    prompts = [f"{label}: question {number // 8:04d}? " for number in range(NUM_ITEMS)]
    completions = [f"answer {number:04d} " + "word " * (number % 17) for number in range(NUM_ITEMS)]
    pairs = zip(prompts, completions, strict=True)
    assert await client.score(prompts, completions) == [oracle_reward_of_text(*pair) for pair in pairs]


def client_of(server: RunningServer) -> AsyncRewardClient:
    return AsyncRewardClient(server.url, deadline_s=60, chunks=ChunkLimits(max_items=NUM_ITEMS))


async def test_all_replicas_compute_a_large_request(server: RunningServer) -> None:
    """Each request gives a shard to each of three replicas, none is retried, and every reward is right."""
    before = {outcome: shards(server, outcome) for outcome in ("here", "sibling", "retried")}
    async with client_of(server) as client:
        for number in range(NUM_REQUESTS):
            await score(client, f"divided {number}")
    new = {outcome: shards(server, outcome) - count for outcome, count in before.items()}

    assert new == {"here": NUM_REQUESTS, "sibling": NUM_REQUESTS * (NUM_REPLICAS - 1), "retried": 0}


async def test_a_replica_is_killed_while_it_has_shards(server: RunningServer) -> None:
    """A replica that stops while it has shards of every request, and then dies, costs no reward."""
    replica = next(process for process in server.descendants() if "ServeReplica" in " ".join(process.cmdline()))
    async with client_of(server) as client:
        for number in range(NUM_REQUESTS):  # every replica knows its siblings then
            await score(client, f"before {number}")
        replica.send_signal(signal.SIGSTOP)
        calls = [asyncio.create_task(score(client, f"killed {number}")) for number in range(NUM_REQUESTS)]
        await asyncio.sleep(0.7)
        num_waiting = sum(not call.done() for call in calls)
        replica.kill()
        await asyncio.gather(*calls)

    assert num_waiting == NUM_REQUESTS  # each waited for the replica that had stopped: for a shard, or for the answer
    assert await asyncio.to_thread(eventually, lambda: num_replicas(server) == NUM_REPLICAS, 60)


def num_replicas(server: RunningServer) -> int:
    """How many replicas run; one that is starting has another name."""
    names = []
    for process in server.descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(" ".join(process.cmdline()))
    return sum("ServeReplica" in name for name in names)
