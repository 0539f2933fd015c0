"""Any sequence of calls leaves the queue consistent: nothing is lost, doubled, late, or over the budget."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from service.errors import Overloaded
from service.records import TokenSequence
from service.scheduling.budget import BatchBudget, batch_cost
from service.scheduling.queue import Queue

MAX_WAITING = 300
BUDGETS = (BatchBudget("packed", 40, 4), BatchBudget("padded", 60, 6), BatchBudget("packed", 10, 16))


class QueueMachine(RuleBasedStateMachine):
    """Admits, fills, cancels, expires and empties a queue in any order, beside a plain account of what waits."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue(MAX_WAITING, min_shared_prefix_tokens=4, batch_tokens=40)
        self.now = 0.0
        self.num_requests = 0
        self.reserved: dict[int, int] = {}
        self.waiting: dict[tuple[int, int], TokenSequence] = {}
        self.deadlines: dict[int, float] = {}

    @rule(target=requests, num_tokens=st.integers(1, 200))
    def admit(self, num_tokens: int) -> Any:
        request = self.num_requests
        self.num_requests += 1
        before = self.queue.num_waiting_tokens
        try:
            self.queue.admit(request, num_tokens)
        except Overloaded:
            assert before
            assert before + num_tokens > MAX_WAITING
            return -1
        assert not before or before + num_tokens <= MAX_WAITING
        self.reserved[request] = num_tokens
        return request

    @rule(
        request=consumes(requests),
        lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5),
        time_left=st.sampled_from((0.5, 3.0, 1e9)),
        prompt=st.integers(0, 2),
    )
    def put(self, request: int, lengths: list[int], time_left: float, prompt: int) -> None:
        if request not in self.reserved:
            return
        del self.reserved[request]
        sequences = [TokenSequence((*[prompt] * (length - 1), index)) for index, length in enumerate(lengths)]
        deadline = self.now + time_left
        self.queue.put(request, sequences, [prompt] * len(sequences), now=self.now, deadline=deadline)
        self.deadlines[request] = deadline
        self.waiting |= {(request, index): sequence for index, sequence in enumerate(sequences)}

    @rule(request=consumes(requests))
    def cancel_reserved(self, request: int) -> None:
        self.cancel(request)

    @rule(data=st.data())
    def cancel_waiting(self, data: st.DataObject) -> None:
        if self.waiting:
            self.cancel(data.draw(st.sampled_from(sorted({request for request, _ in self.waiting}))))

    def cancel(self, request: int) -> None:
        dropped = [key for key in self.waiting if key[0] == request]
        assert self.queue.cancel(request) == len(dropped)
        self.reserved.pop(request, None)
        for key in dropped:
            del self.waiting[key]

    @rule(budget=st.sampled_from(BUDGETS), speed=st.floats(0.01, 2.0))
    def take(self, budget: BatchBudget, speed: float) -> None:
        taken = self.queue.take_batch(self.now, budget)
        for entry in (*taken.entries, *taken.expired):
            assert self.waiting.pop((int(str(entry.request)), entry.index)) is entry.sequence
        assert all(entry.deadline > self.now for entry in taken.entries)
        assert all(entry.deadline <= self.now for entry in taken.expired)
        if len(taken.entries) > 1:
            assert len(taken.entries) <= budget.max_sequences
            shared = sum(entry.num_shared for entry in taken.entries) if budget.cost == "packed" else 0
            lengths = [entry.num_tokens for entry in taken.entries]
            assert batch_cost(lengths, budget.cost) - shared <= budget.max_tokens
        assert taken.entries or not any(self.deadlines[request] > self.now for request, _ in self.waiting)
        self.queue.record_throughput(sum(entry.num_tokens for entry in taken.entries), speed)

    @rule(seconds=st.sampled_from((0.1, 1.0, 10.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def counts_agree(self) -> None:
        num_tokens = sum(sequence.num_tokens for sequence in self.waiting.values())
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_waiting_tokens == num_tokens + sum(self.reserved.values())

    def teardown(self) -> None:
        while True:
            taken = self.queue.take_batch(self.now, BUDGETS[0])
            if not (taken.entries or taken.expired):
                break
            for entry in (*taken.entries, *taken.expired):
                del self.waiting[(int(str(entry.request)), entry.index)]
        assert not self.waiting


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, derandomize=True)
