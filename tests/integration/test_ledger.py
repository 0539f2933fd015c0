"""A hundred thousand items through the real server: every item gets its own reward, exactly once."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from reward_client import AsyncRewardClient, ChunkLimits

from service.engines.oracle import oracle_reward_of_text

NUM_ITEMS = 100_000
NUM_CLIENTS = 64
REQUEST_SIZES = {1: 2000, 2: 1000, 8: 750, 64: 240, 256: 100, 1000: 45}
"""Number of requests by their number of items; one more request has the rest of NUM_ITEMS."""

WORDS = ("reward", "model", "größer", "报酬", "🙂", "\n\t", "short", "a", "longer", "completion", "several", "words")


@dataclass(frozen=True)
class Entry:
    """One item and its expected reward."""

    id: str
    prompt: str
    completion: str

    @property
    def expected(self) -> float:
        return oracle_reward_of_text(self.prompt, self.completion)

    def to_wire(self) -> dict[str, str]:
        return {"prompt": self.prompt, "completion": self.completion, "id": self.id}


def make_requests(seed: int) -> list[list[Entry]]:
    """Return all items, each with its number in its text, in requests of mixed sizes in random order."""
    random_ = random.Random(seed)
    sizes = [size for size, count in REQUEST_SIZES.items() for _ in range(count)]
    sizes.append(NUM_ITEMS - sum(sizes))
    random_.shuffle(sizes)
    numbers = iter(range(NUM_ITEMS))
    return [[make_entry(next(numbers), random_) for _ in range(size)] for size in sizes]


def make_entry(number: int, random_: random.Random) -> Entry:
    completion = " ".join(random_.choices(WORDS, k=random_.randint(0, 12)))
    return Entry(id=f"item-{number}", prompt=f"Question {number // 8}: ", completion=f"{number} {completion}")


@pytest.mark.slow
async def test_no_reward_is_lost_swapped_or_duplicated(server_url: str) -> None:
    """100,000 oracle items from 64 clients: every reward is exactly that of its item, and the metrics agree."""
    requests = make_requests(seed=7)
    waiting = iter(requests)
    num_answers: Counter[str] = Counter()
    wrong: list[str] = []

    async def work() -> None:
        one_request_a_call = ChunkLimits(max_items=2048)
        async with AsyncRewardClient(server_url, max_connections=1, chunks=one_request_a_call) as client:
            for entries in waiting:
                for entry, scored in zip(entries, await client.score_items(map(Entry.to_wire, entries)), strict=True):
                    num_answers[str(scored.id)] += 1
                    if (scored.id, scored.reward) != (entry.id, entry.expected):
                        wrong.append(entry.id)

    before = count_scored(server_url)
    async with asyncio.timeout(280):
        await asyncio.gather(*(work() for _ in range(NUM_CLIENTS)))

    assert wrong == []
    assert len(num_answers) == NUM_ITEMS
    assert set(num_answers.values()) == {1}
    assert count_scored(server_url) - before == NUM_ITEMS


def count_scored(url: str) -> int:
    """Return the number of items with a reward since the start, over all replicas, from the server's metrics."""
    exposition = httpx2.get(f"{url}/metrics", timeout=30).text
    return sum(
        int(sample.value)
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == "rm_items_total" and sample.labels["outcome"] == "ok"
    )
