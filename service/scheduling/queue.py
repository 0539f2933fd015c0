"""The token-budget queue: which waiting sequences share the next forward pass, and whether more work may wait.

Pure: no clock, no lock, no device. The caller passes ``now``, holds the lock and runs the batch; tests pass numbers.
The order of service is decided in ``flows``, the content of a batch in ``packed_batch`` and ``padded_batch``, the
refusals in ``admission``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import inf

from service.records import TokenSequence
from service.scheduling.admission import Admission
from service.scheduling.budget import BatchBudget
from service.scheduling.flows import Entry, FlowTable
from service.scheduling.packed_batch import NumCachedTokens, PackedBatchBuilder, nothing_cached
from service.scheduling.padded_batch import take_padded_batch


@dataclass(frozen=True, slots=True)
class TakenBatch:
    """Entries that were taken out of the queue."""

    entries: tuple[Entry, ...] = ()
    """To compute now."""

    expired: tuple[Entry, ...] = ()
    """Entries whose deadline had passed; they do not count in the budget."""


class Queue:
    """The bounded queue of sequences that wait for the engine.

    A request is admitted with an estimate of its tokens, put in when they are known, and leaves in batches. Not
    thread-safe: the caller holds a lock.

    Args:
        max_waiting_tokens: requests that would exceed it are refused.
        min_shared_prefix_tokens: common prefixes of at least this many tokens are computed once in a pass; None: not
            shared.
        batch_tokens: usual batch budget: requests within it leave nearly in order of arrival; 0: no request has an
            overtake limit.
    """

    def __init__(
        self, max_waiting_tokens: int, min_shared_prefix_tokens: int | None = None, *, batch_tokens: int = 0
    ) -> None:
        self._min_shared_prefix_tokens = min_shared_prefix_tokens
        self._admission = Admission(max_waiting_tokens, batch_tokens)
        self._flows = FlowTable(min_shared_prefix_tokens, batch_tokens)

    def __len__(self) -> int:
        return self._flows.num_entries

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens admitted (as estimated) or put in (as counted) that have not left yet."""
        return self._admission.num_reserved_tokens + self._flows.num_tokens

    @property
    def tokens_per_s(self) -> float | None:
        """The recent throughput of the engine; None until something was measured."""
        return self._admission.throughput.tokens_per_s

    @property
    def oldest_arrival(self) -> float | None:
        """Arrival of the waiting request that arrived first; None when nothing waits."""
        return self._flows.oldest_arrival

    def admit(self, request: Hashable, num_tokens: int, *, now: float = 0.0, time_left_s: float = inf) -> None:
        """Reserve room for a request before its tokens are known.

        Args:
            request: a key not in use.
            num_tokens: an estimate; `put` replaces it by the number of its tokens.
            now: seconds of any clock that does not go back.
            time_left_s: seconds until its deadline.

        Raises:
            Overloaded: too much waits, as `Admission.reserve` describes.
        """
        self._admission.reserve(
            request,
            num_tokens,
            self._flows.num_tokens,
            now=now,
            time_left_s=time_left_s,
            tokens_before=self._flows.tokens_before,
        )

    def record_throughput(self, num_tokens: int, seconds: float) -> None:
        """Record how fast the engine was: ``retry_after_s`` of a refusal is computed from it."""
        self._admission.throughput.record(num_tokens, seconds)

    def put(
        self,
        request: Hashable,
        sequences: Iterable[TokenSequence],
        prefixes: Iterable[Hashable],
        *,
        now: float,
        deadline: float,
    ) -> None:
        """Put a request's sequences into the queue; its reservation ends.

        Sequences of one prefix leave together where they fit, and otherwise in the order given here.

        Args:
            request: a key that has nothing in the queue.
            sequences: with index 0, 1, 2... in the request.
            prefixes: one key for each sequence; equal where the prompt is shared, also between requests.
            now: when they begin to wait.
            deadline: after it none of them is computed.
        """
        self._admission.release(request)
        self._flows.add(request, sequences, prefixes, now=now, deadline=deadline)

    def cancel(self, request: Hashable) -> int:
        """Drop what a request has reserved or waiting; return the number of entries dropped, 0 for an unknown key."""
        self._admission.release(request)
        return len(self._flows.drop(request))

    def finish_one_by_one(self) -> None:
        """From now on finish whole requests, the one with the fewest waiting tokens first, in place of fairness."""
        self._flows.finish_one_by_one()

    def take_batch(
        self, now: float, budget: BatchBudget, num_cached_tokens: NumCachedTokens = nothing_cached
    ) -> TakenBatch:
        """Take the next batch out of the queue.

        Its first entry belongs to the request with the lowest virtual time, or to one that was skipped too often. A
        packed batch takes the entries of one prefix together where a batch can hold them, also from other requests. A
        padded batch takes sequences of similar length to its first entry, as long as they make the pass more efficient.

        An expired request is detected when it would be served; a caller that gives up earlier calls `cancel`. The run
        time depends on the size of the batch, not on the length of the queue.

        Args:
            now: compared with the deadlines.
            budget: the budget of one pass. A single sequence that exceeds the budget gets a batch of its own: admission
                accepted it, so it is computed.
            num_cached_tokens: returns the cached tokens of a sequence in the engine's present state; called for
                candidates of a packed batch.

        Returns:
            The batch, empty only when nothing waits that is in time, and the entries that expired.
        """
        self._flows.start_batch()
        expired: list[Entry] = []
        if budget.cost == "packed":
            builder = PackedBatchBuilder(self._flows, budget, self._min_shared_prefix_tokens, num_cached_tokens)
            entries = builder.fill(now, expired)
        else:
            entries = take_padded_batch(self._flows, budget, now, expired)
        return TakenBatch(tuple(entries), tuple(expired))
