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
    waits: list[tuple[float, float]] = field(default_factory=list)
    """Arrival, and seconds until the answer, of those answered in time."""
    retry_after: list[float] = field(default_factory=list)

    def goodput(self, seconds: float) -> float:
        """Tokens of requests answered in time, as a share of what the engine can do."""
        return sum(items * count for items, count in self.in_time.items()) * ITEM_TOKENS / (SPEED * seconds)

    def p99_s(self, begin: float) -> float:
        """99th percentile of the waits of requests that arrived at or after a time."""
        waits = sorted(wait_s for arrived, wait_s in self.waits if arrived >= begin)
        return waits[int(0.99 * len(waits))]


def simulate(
    load: float,
    timeout_s: float,
    sizes: list[int],
    *,
    seconds: float = 60.0,
    budget: BatchBudget = BUDGET,
) -> Outcomes:
    """Send requests of random sizes at a multiple of the engine's speed, in a Poisson process.

    A caller whose deadline passes gives up, and what it has waiting is dropped.
    """
    chance = random.Random(1)
    queue = Queue(2_097_152, batch_tokens=budget.max_tokens)
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
                queue.admit(number, size * ITEM_TOKENS, now=now, time_left_s=timeout_s)
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
                        outcomes.waits.append((arrived, now - arrived))
            running = Counter()
        if not running:
            taken = queue.take_batch(now, budget)
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


def test_accepted_requests_are_answered_soon_under_overload() -> None:
    """Past the first deadline of a threefold overload, p99 is at most twice that at 0.8 times the speed (goal R2)."""
    small_passes = BatchBudget("packed", 1000, 512)
    before = simulate(0.8, 4.0, [5], seconds=30.0, budget=small_passes)
    overloaded = simulate(3.0, 4.0, [5], seconds=30.0, budget=small_passes)
    assert overloaded.p99_s(4.0) <= 2.0 * before.p99_s(0.0)
    assert overloaded.goodput(30.0) >= 0.9


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


def idle_queue() -> Queue:
    """An empty queue whose engine computes `SPEED` tokens a second."""
    queue = Queue(2_097_152)
    queue.record_throughput(SPEED * 10, 10.0)
    return queue


def fill(queue: Queue, timeout_s: float, now: float = 0.0, *, name: str = "") -> int:
    """Admit requests of one item until one is refused; return the number of those that were admitted."""
    for number in range(100_000):
        try:
            queue.admit((name, now, number), ITEM_TOKENS, now=now, time_left_s=timeout_s)
        except Overloaded:
            return number
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize("num_requests", [1, 1024])
def test_a_batch_of_a_trainer_is_admitted_whole(num_requests: int) -> None:
    """An idle queue admits 1,024 items of 100 tokens at once, in one request or in many, for a deadline of 30 s."""
    queue = idle_queue()
    for number in range(num_requests):
        queue.admit(number, 1024 // num_requests * ITEM_TOKENS, time_left_s=30.0)


def test_the_queue_is_short_while_requests_are_refused() -> None:
    """Half of a deadline of 10 s may wait until one is refused, then less, and half of it again 5 s later."""
    queue = idle_queue()
    assert fill(queue, 10.0) == 500
    for number in range(340):
        queue.cancel(("", 0.0, number))

    assert fill(queue, 10.0, now=1.0) == 0
    assert fill(queue, 10.0, now=5.9) == 0
    assert fill(queue, 10.0, now=11.0) == 340


def test_a_refusal_by_the_short_queue_says_so() -> None:
    """A request that would be in time, but waits longer than overload allows, is told the wait and the bound."""
    queue = idle_queue()
    assert fill(queue, 10.0) == 500
    for number in range(340):
        queue.cancel(("", 0.0, number))

    with pytest.raises(Overloaded, match=r"16000 tokens wait, for 1\.6 s; under overload at most 1\.5 s may be"):
        queue.admit("next", ITEM_TOKENS, now=1.0, time_left_s=10.0)


def test_patient_requests_are_not_refused_for_impatient_ones() -> None:
    """While those with a deadline of 2 s are too many, those of 3 s and of a minute may still wait for half of it."""
    queue = idle_queue()
    assert fill(queue, 2.0) == 100
    assert fill(queue, 3.0, name="less patient") == 50
    assert fill(queue, 60.0, name="patient") == 2850
    for number in range(2840):
        queue.cancel(("patient", 0.0, number))
    assert fill(queue, 60.0, name="patient again") == 2840


def test_a_request_that_is_too_large_says_nothing_about_others() -> None:
    """Where its own size, and not what waits, makes a request late, later ones are admitted as before."""
    queue = idle_queue()
    queue.admit("first", ITEM_TOKENS, time_left_s=10.0)
    with pytest.raises(Overloaded):
        queue.admit("too large", 10_000 * 10, time_left_s=10.0)
    assert fill(queue, 10.0) == 499
