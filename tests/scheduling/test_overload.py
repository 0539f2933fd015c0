"""Overload, simulated: the queue with a clock of its own, an engine of constant speed, and more work than it can do."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush

import pytest

from service.errors import Overloaded
from service.records import TokenSequence
from service.scheduling.budget import BatchBudget
from service.scheduling.queue import Queue

SPEED = 10_000
"""Tokens a second."""
BUDGET = BatchBudget("packed", 2048, 512)
ITEM_TOKENS = 100


@dataclass
class Outcomes:
    """What became of the requests of a simulation."""

    sent: int = 0
    refused: int = 0
    in_time: Counter[int] = field(default_factory=Counter)
    """Requests answered in time, by number of items."""
    late: int = 0
    waits: list[float] = field(default_factory=list)
    """Seconds from arrival to answer, of those answered in time."""
    retry_after: list[float] = field(default_factory=list)

    def goodput(self, seconds: float) -> float:
        """Tokens of requests answered in time, as a share of what the engine can do."""
        return sum(items * count for items, count in self.in_time.items()) * ITEM_TOKENS / (SPEED * seconds)


def simulate(load: float, timeout_s: float, sizes: list[int], *, seconds: float = 60.0, seed: int = 1) -> Outcomes:
    """Send requests of random sizes at a multiple of the engine's speed, in a Poisson process.

    A caller whose deadline passes gives up, and what it has waiting is dropped.
    """
    chance = random.Random(seed)
    queue = Queue(2_097_152, batch_tokens=BUDGET.max_tokens)
    queue.record_throughput(SPEED * 10, 10.0)
    mean_tokens = ITEM_TOKENS * sum(sizes) / len(sizes)
    events: list[tuple[float, int, str]] = []
    now = 0.0
    requests: dict[int, tuple[float, int]] = {}
    while now < seconds:
        now += chance.expovariate(load * SPEED / mean_tokens)
        number = len(requests)
        requests[number] = now, chance.choice(sizes)
        heappush(events, (now, number, "arrival"))
        heappush(events, (now + timeout_s, number, "deadline"))
    left: dict[int, int] = {}
    outcomes, free_at, running = Outcomes(), 0.0, Counter[int]()
    while events:
        now, number, event = heappop(events)
        arrived, size = requests.get(number, (0.0, 0))
        if event == "arrival":
            outcomes.sent += 1
            try:
                queue.admit(number, size * ITEM_TOKENS, time_left_s=timeout_s)
            except Overloaded as refusal:
                outcomes.refused += 1
                outcomes.retry_after.append(refusal.retry_after_s)
            else:
                sequences = [TokenSequence((number, item, *[7] * (ITEM_TOKENS - 2))) for item in range(size)]
                queue.put(number, sequences, range(size), now=now, deadline=arrived + timeout_s)
                left[number] = size
        elif event == "deadline" and number in left:
            queue.cancel(number)
            del left[number]
            outcomes.late += 1
        elif event == "done":
            queue.record_throughput(sum(running.values()) * ITEM_TOKENS, sum(running.values()) * ITEM_TOKENS / SPEED)
            for finished, count in running.items():
                if finished in left:
                    left[finished] -= count
                    if not left[finished]:
                        del left[finished]
                        arrived, size = requests[finished]
                        outcomes.in_time[size] += 1
                        outcomes.waits.append(now - arrived)
            running = Counter()
        if not running:
            taken = queue.take_batch(now, BUDGET)
            running = Counter(entry.request for entry in taken.entries)  # type: ignore[misc]
            if running:
                free_at = now + sum(running.values()) * ITEM_TOKENS / SPEED
                heappush(events, (free_at, -1, "done"))
    return outcomes


@pytest.mark.parametrize("timeout_s", [0.5, 2.0, 10.0])
@pytest.mark.parametrize(("load", "share"), [(3.0, 0.9), (10.0, 0.75)])
def test_overload_sheds_and_does_not_collapse(load: float, share: float, timeout_s: float) -> None:
    """At 3 times the engine's speed 90 percent of it goes into answers in time, at 10 times 75 percent (goal R1)."""
    outcomes = simulate(load, timeout_s, [8], seconds=20.0)
    assert outcomes.goodput(20.0) >= share
    assert outcomes.refused > 0.5 * outcomes.sent
    assert outcomes.late <= 0.02 * outcomes.sent
    assert all(wait_s > 0 for wait_s in outcomes.retry_after)


@pytest.mark.parametrize("sizes", [[64], [1, 64]])
def test_large_requests_are_finished_under_overload(sizes: list[int]) -> None:
    """At 3 times the engine's speed, requests that take a third of their deadline alone are finished in time too."""
    outcomes = simulate(3.0, 2.0, sizes, seconds=20.0)
    assert outcomes.goodput(20.0) >= 0.9
    assert outcomes.late == 0


def test_nothing_is_refused_below_the_speed() -> None:
    """At 80 percent of the engine's speed every request is admitted and answered in time."""
    outcomes = simulate(0.8, 4.0, [8], seconds=20.0)
    assert outcomes.refused == outcomes.late == 0


def test_small_requests_are_admitted_beside_bulk() -> None:
    """Bulk that takes longer than the deadline of a small request does not get that refused: it is served before."""
    queue = Queue(10**9, batch_tokens=BUDGET.max_tokens)
    queue.record_throughput(SPEED * 10, 10.0)
    bulk = [TokenSequence((1, item, *[7] * 98)) for item in range(5000)]
    queue.put("bulk", bulk, range(5000), now=0.0, deadline=600.0)
    queue.admit("small", 100, time_left_s=0.5)
    with pytest.raises(Overloaded, match=r"would come after 2\.21 s or more; 3 s are"):
        queue.admit("medium", 10_000, time_left_s=3.0)
    queue.admit("patient", 10_000, time_left_s=5.0)


def test_a_request_that_is_too_large_for_its_deadline_is_not_refused_by_an_empty_queue() -> None:
    """An empty queue admits any request, also one that cannot be finished in time: it gets its 504."""
    queue = Queue(10**9, batch_tokens=BUDGET.max_tokens)
    queue.record_throughput(SPEED * 10, 10.0)
    queue.admit("large", 10**7, time_left_s=0.1)


def test_requests_are_admitted_after_a_time_of_small_passes() -> None:
    """Passes of one small request have a low throughput; requests that arrive together then are still admitted."""
    queue = Queue(2_097_152, batch_tokens=65_536)
    queue.record_throughput(65_536, 0.7)
    for _ in range(2000):
        queue.record_throughput(ITEM_TOKENS, 0.025)  # 4,000 tokens a second: a full pass would take 16 s

    for number in range(64):
        queue.admit(number, ITEM_TOKENS, time_left_s=10.0)
    with pytest.raises(Overloaded):
        queue.admit("large", 50_000, time_left_s=10.0)
