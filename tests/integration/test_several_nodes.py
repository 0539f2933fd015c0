"""Four replicas on four Ray nodes of this machine, with an oracle whose passes take as long as a model's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray_cluster import RunningCluster, application, running_cluster
from reward_client import AsyncRewardClient, RewardClient

from service.engines.oracle import oracle_reward_of_text

pytestmark = pytest.mark.slow

SECONDS_PER_TOKEN = 60e-6
"""Of the simulated forward pass; 16,667 tokens/s for each replica."""
SETTINGS = {
    "oracle": {"seconds_per_token": SECONDS_PER_TOKEN},
    "batching": {"max_batch_tokens": 2048},
    "scatter": {"min_tokens": 4096},
}
GROUP_SIZE = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """The same application with one replica and with four, which have a node each."""
    applications = (application("one", 1, **SETTINGS), application("four", 4, **SETTINGS))
    with running_cluster(tmp_path_factory.mktemp("cluster"), *applications, nodes=4) as running:
        yield running


def texts(num_items: int, label: str) -> tuple[list[str], list[str]]:
    """Prompts and completions of about 120 bytes in groups of eight; no two calls with different labels share one."""
    prompts = [f"{label}: question {number // GROUP_SIZE:06d}? " for number in range(num_items)]
    return prompts, [f"answer {number:06d} " + "word " * (8 + number % 17) for number in range(num_items)]


def expected(prompts: list[str], completions: list[str]) -> list[float]:
    return [oracle_reward_of_text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def seconds_of_one_request(url: str, label: str) -> float:
    """Time one request of 4,096 items..."""
    prompts, completions = texts(1024, label)
    with RewardClient(url, deadline_s=120) as client:
        begin = time.perf_counter()
        rewards = client.score(prompts, completions)
        seconds = time.perf_counter() - begin
    assert rewards == expected(prompts, completions)
    return seconds


def test_one_large_request(cluster: RunningCluster) -> None:
    """One request of 1,024 items finishes at least 3.5 times as fast on four replicas as on one, every reward right."""
    seconds_of_one_request(f"{cluster.url}/four", "warm-up")
    one = min(seconds_of_one_request(f"{cluster.url}/one", f"one {run}") for run in range(2))
    four = min(seconds_of_one_request(f"{cluster.url}/four", f"four {run}") for run in range(3))

    print(f"one replica {one:.2f} s, four replicas {four:.2f} s: {one / four:.2f}x")
    assert one / four >= 3.5
