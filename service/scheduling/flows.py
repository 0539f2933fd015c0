"""The waiting requests in the order in which they are served: start-time fair queueing, in tokens.

Goyal, Vin and Cheng, "Start-time Fair Queuing" (SIGCOMM 1996). Each request is a flow. The flow with the lowest virtual
time is served next, and being served advances its virtual time by the tokens computed for it. A new flow starts at the
lowest virtual time in the queue: it is in the next batch however large the other requests are, and it gets no
compensation for the time before it arrived.

Among flows of equal virtual time the smaller request is served first, with two bounds. A request that fits a batch is
overtaken only until `OVERTAKE_LIMIT_RATIO` times its own tokens were computed, so requests of similar size are served
nearly in order of arrival. And a flow that was skipped by `MAX_SKIPPED_BATCHES` batches is served first in the next.

While the replica shuts down fairness would let all flows advance and none finish in time. Then the flow with the fewest
waiting tokens is served until it is finished (shortest remaining time first; Schrage, 1968): no other order finishes
more requests by any time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import chain
from math import inf
from typing import TypeAlias

from service.records import TokenSequence
from service.scheduling.prefix_tree import common_prefix_length, shareable_tokens

MAX_SKIPPED_BATCHES = 8
"""Batches that may skip a request; the next one serves it first, so that a stream of new requests cannot starve it."""

OVERTAKE_LIMIT_RATIO = 4
"""Later requests may overtake one that fits a batch until this many times its own tokens were computed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sequence that waits."""

    request: Hashable
    """The key of its request."""

    index: int
    """Index of the sequence in its request."""

    sequence: TokenSequence

    prefix: Hashable
    """Equal for sequences that share their prompt, also between requests."""

    arrived: float
    """When it began to wait, in seconds of the caller's clock."""

    deadline: float
    """Its deadline, in seconds of the caller's clock."""

    num_shared: int = 0
    """Leading tokens that a pass does not compute again if it also holds the entry before this one in its group."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return self.sequence.num_tokens

    @property
    def num_own(self) -> int:
        """Tokens that are computed for this entry alone."""
        return self.num_tokens - self.num_shared


@dataclass(slots=True)
class PrefixGroup:
    """The waiting entries of one request that share a prefix, by index, in the order in which they are taken."""

    prefix: Hashable
    entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    num_own: int = 0
    last: TokenSequence | None = None

    @property
    def cost(self) -> int:
        """Tokens of a pass over the whole group.

        Tokens that the first entry shared with one that was taken earlier are computed again.
        """
        return self.num_own + next(iter(self.entries.values())).num_shared

    def add(self, entry: Entry) -> None:
        """Append an entry."""
        self.entries[entry.index] = entry
        self.num_own += entry.num_own
        self.last = entry.sequence

    def remove(self, entry: Entry) -> None:
        """Remove an entry."""
        del self.entries[entry.index]
        self.num_own -= entry.num_own


@dataclass(slots=True, eq=False)
class Flow:
    """The waiting entries of one request."""

    request: Hashable

    number: int
    """Requests are numbered in order of arrival."""

    arrived: float
    deadline: float

    virtual_time: float
    """Start tag of the flow's next group, in tokens."""

    last_batch: int
    """Number of the last batch that served the flow, or of the batch after which it arrived."""

    overtake_limit: float = inf
    """Total of computed tokens from which on no later flow of equal virtual time is served before this one."""

    groups: OrderedDict[Hashable, PrefixGroup] = field(default_factory=OrderedDict)
    num_entries: int = 0
    num_tokens: int = 0

    heap_item: HeapItem | None = None
    """The one item of the heap that is valid for this flow; None while the flow is not in the heap."""

    @property
    def entries(self) -> Iterator[Entry]:
        """All waiting entries, group by group."""
        return chain.from_iterable(group.entries.values() for group in self.groups.values())

    @property
    def first_group(self) -> PrefixGroup:
        """The group that is served next."""
        return next(iter(self.groups.values()))


HeapItem: TypeAlias = tuple[float, float, int, int, Flow]
"""Virtual time, overtake limit, waiting tokens, arrival number, flow: flows are served in this order. Where flows are
finished one by one, the first two are zero."""


def num_shared_tokens(before: TokenSequence, sequence: TokenSequence, min_shared_prefix_tokens: int | None) -> int:
    """Return how many leading tokens a pass computes once for both sequences, or a lower bound of it.

    Args:
        before: the sequence before this one in the batch.
        sequence: that may share tokens with it.
        min_shared_prefix_tokens: common prefixes of fewer tokens are not shared; None: prefixes are not shared.
    """
    if min_shared_prefix_tokens is None:
        return 0
    ids, prompt = sequence.token_ids, sequence.num_prompt_tokens
    if prompt is not None and ids[:prompt] == before.token_ids[:prompt]:  # by far the most common, and cheap to detect
        return shareable_tokens(prompt, min_shared_prefix_tokens)
    return shareable_tokens(common_prefix_length(before.token_ids, ids), min_shared_prefix_tokens)


class FlowTable:
    """All waiting flows: in order of fairness, by prefix, by arrival and by last service. Not thread-safe.

    Args:
        min_shared_prefix_tokens: common prefixes of at least this many tokens are computed once in a pass; None: not
            shared.
        batch_tokens: usual batch budget: requests within it have an overtake limit; 0: no request has one.
    """

    def __init__(self, min_shared_prefix_tokens: int | None, batch_tokens: int) -> None:
        self.num_entries = 0
        self.num_tokens = 0
        self.finishes_one_by_one = False
        self._min_shared_prefix_tokens = min_shared_prefix_tokens
        self._batch_tokens = batch_tokens
        self._flows: OrderedDict[Hashable, Flow] = OrderedDict()  # in order of arrival
        self._least_recent: OrderedDict[Hashable, Flow] = OrderedDict()  # in order of last service
        self._by_prefix: dict[Hashable, OrderedDict[int, Flow]] = {}
        self._heap: list[HeapItem] = []
        self._virtual_time = 0.0
        self._num_flows_ever = 0
        self._num_computed_tokens = 0
        self._num_batches = 0
        self._last_aged_batch = 0

    @property
    def oldest_arrival(self) -> float | None:
        """Arrival of the waiting request that arrived first; None when nothing waits."""
        return next(iter(self._flows.values())).arrived if self._flows else None

    def tokens_before(self, num_tokens: int) -> int:
        """Return how many waiting tokens are computed before a new request of so many tokens is finished.

        By fair queueing a request that is larger than the new one has advanced as far as the new one by then.
        """
        return sum(min(flow.num_tokens, num_tokens) for flow in self._flows.values())

    def add(
        self,
        request: Hashable,
        sequences: Iterable[TokenSequence],
        prefixes: Iterable[Hashable],
        *,
        now: float,
        deadline: float,
    ) -> None:
        """Add a request, as `Queue.put` describes."""
        self._num_flows_ever += 1
        flow = Flow(request, self._num_flows_ever, now, deadline, self._lowest_virtual_time(), self._num_batches)
        for index, (sequence, prefix) in enumerate(zip(sequences, prefixes, strict=True)):
            group = flow.groups.get(prefix)
            if group is None:
                group = flow.groups[prefix] = PrefixGroup(prefix)
                self._by_prefix.setdefault(prefix, OrderedDict())[flow.number] = flow
            num_shared = self._num_shared(group.last, sequence)
            group.add(Entry(request, index, sequence, prefix, now, deadline, num_shared))
            flow.num_entries += 1
            flow.num_tokens += sequence.num_tokens
        if not flow.num_entries:
            return
        if flow.num_tokens <= self._batch_tokens:
            flow.overtake_limit = self._num_computed_tokens + OVERTAKE_LIMIT_RATIO * flow.num_tokens
        self._flows[request] = self._least_recent[request] = flow
        self.num_entries += flow.num_entries
        self.num_tokens += flow.num_tokens
        self._push(flow)

    def drop(self, request: Hashable) -> list[Entry]:
        """Remove all entries of a request and return them; none for an unknown key."""
        flow = self._flows.get(request)
        return self._drop(flow) if flow else []

    def finish_one_by_one(self) -> None:
        """From now on serve the flow with the fewest waiting tokens until it is finished, those that come included."""
        self.finishes_one_by_one = True
        self._heap.clear()
        for flow in self._flows.values():
            self._push(flow)

    def start_batch(self) -> None:
        """Count a batch; called once before the flows of a batch are chosen."""
        self._num_batches += 1

    def by_priority(self, now: float, expired: list[Entry]) -> Iterator[Flow]:
        """Yield the flows in the order in which they are to be served, each removed from that order.

        The caller serves a flow or puts it back (`requeue`).

        Args:
            now: flows with a deadline up to it are dropped.
            expired: gets the entries of dropped flows.
        """
        skipped = self._pop_skipped_too_often()
        if skipped is not None and not self._drop_if_expired(skipped, now, expired):
            yield skipped
        while self._heap:
            item = heappop(self._heap)
            flow = item[-1]
            if flow.heap_item is not item:
                continue
            flow.heap_item = None
            if not self._drop_if_expired(flow, now, expired):
                yield flow

    def requeue(self, flows: Iterable[Flow]) -> None:
        """Put flows that `by_priority` yielded back into the order, where they still have entries and are not in it."""
        for flow in flows:
            if flow.num_entries and flow.heap_item is None:
                self._push(flow)

    def serve(self, flow: Flow, entries: Sequence[Entry], cost: int) -> None:
        """Take entries out of a flow, and advance its virtual time by what they cost, in tokens."""
        self._remove(flow, entries)
        flow.virtual_time += cost
        self._num_computed_tokens += cost
        flow.last_batch = self._num_batches
        if flow.num_entries:
            self._least_recent.move_to_end(flow.request)
            self._push(flow)

    def with_prefix(self, prefix: Hashable) -> Iterable[Flow]:
        """Return the flows that have entries of a prefix, in order of arrival."""
        return self._by_prefix.get(prefix, {}).values()

    def _lowest_virtual_time(self) -> float:
        """Return the lowest virtual time of the waiting flows, and never one that has passed already."""
        while self._heap and self._heap[0][-1].heap_item is not self._heap[0]:
            heappop(self._heap)
        if self._heap:
            self._virtual_time = max(self._virtual_time, self._heap[0][0])
        return self._virtual_time

    def _num_shared(self, before: TokenSequence | None, sequence: TokenSequence) -> int:
        return 0 if before is None else num_shared_tokens(before, sequence, self._min_shared_prefix_tokens)

    def _push(self, flow: Flow) -> None:
        fairness = (0.0, 0.0) if self.finishes_one_by_one else (flow.virtual_time, flow.overtake_limit)
        flow.heap_item = (*fairness, flow.num_tokens, flow.number, flow)
        heappush(self._heap, flow.heap_item)
        if len(self._heap) > 2 * len(self._flows) + 64:  # most items are of flows that were served or dropped meanwhile
            self._heap = [flow.heap_item for flow in self._flows.values() if flow.heap_item is not None]
            heapify(self._heap)

    def _pop_skipped_too_often(self) -> Flow | None:
        """Pop the least recently served flow if it was skipped too often; once in `MAX_SKIPPED_BATCHES` batches."""
        if (
            self.finishes_one_by_one
            or not self._least_recent
            or self._num_batches - self._last_aged_batch <= MAX_SKIPPED_BATCHES
        ):
            return None
        flow = next(iter(self._least_recent.values()))
        if self._num_batches - flow.last_batch <= MAX_SKIPPED_BATCHES:
            return None
        self._last_aged_batch = self._num_batches
        flow.heap_item = None
        return flow

    def _drop_if_expired(self, flow: Flow, now: float, expired: list[Entry]) -> bool:
        if flow.deadline > now:
            return False
        expired += self._drop(flow)
        return True

    def _drop(self, flow: Flow) -> list[Entry]:
        entries = list(flow.entries)
        self._remove(flow, entries)
        return entries

    def _remove(self, flow: Flow, entries: Sequence[Entry]) -> None:
        for entry in entries:
            group = flow.groups[entry.prefix]
            group.remove(entry)
            if not group.entries:
                del flow.groups[entry.prefix]
                self._forget_prefix(entry.prefix, flow)
        num_tokens = sum(entry.num_tokens for entry in entries)
        flow.num_entries -= len(entries)
        flow.num_tokens -= num_tokens
        self.num_entries -= len(entries)
        self.num_tokens -= num_tokens
        if not flow.num_entries:
            flow.heap_item = None
            del self._flows[flow.request]
            del self._least_recent[flow.request]

    def _forget_prefix(self, prefix: Hashable, flow: Flow) -> None:
        flows = self._by_prefix[prefix]
        del flows[flow.number]
        if not flows:
            del self._by_prefix[prefix]
