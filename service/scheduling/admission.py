"""Admission: whether more work may be queued, and after which delay a refused caller should retry.

Pure: no clock and no lock. A request is admitted with an estimate of its tokens, because tokenizing first would make an
overload expensive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import inf

from service.errors import Overloaded

THROUGHPUT_HALF_LIFE_S = 10.0
"""Engine seconds after which a measurement of the throughput has half its weight."""

DEFAULT_RETRY_AFTER_S = 1.0
"""``retry_after_s`` of a refusal where no throughput has been measured yet."""

USED_SHARE = 0.5
"""Share of the time to a request's deadline within which it must be finished by the estimate at its arrival.

Fair queueing serves requests that arrive later before earlier ones are finished. If the queue could fill the whole
time, then under overload nearly every answer would come just after its deadline, and its computation would be wasted.
"""

OVERLOAD_SHARE = 0.15
"""Share of the time to a request's deadline for which others may be computed before it, while requests with such a
deadline are too many.

A longer queue would make every answer later and none more: under overload the queue never empties.
"""

REMEMBERED_SHARE = 0.5
"""Share of the time to the deadline of a request refused for it, for which requests with such a deadline are known to
be too many. A burst that the engine can compute in `USED_SHARE` of its deadline is over by then."""

SIMILAR_DEADLINE = 1.25
"""A refusal tells something about requests with up to so many times the time to the deadline: those that have more of
it may still be computed in time."""

PATIENT_S = 30.0
"""With more seconds to its deadline a request may wait for `USED_SHARE` of them also under overload. Its caller is a
job that needs all its answers, and gains nothing from a short queue."""


class Throughput:
    """Recent tokens per engine second, and tokens of a pass: means with exponentially decaying weights."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._token_seconds = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None until something was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    @property
    def pass_tokens(self) -> float:
        """Tokens of the pass that runs at a random time, by recent passes; 0 until something was measured."""
        return self._token_seconds / self._seconds if self._seconds > 0 else 0.0

    def record(self, num_tokens: int, seconds: float) -> None:
        """Add one batch: the tokens of its sequences, and its seconds of engine time."""
        decay = 0.5 ** (seconds / THROUGHPUT_HALF_LIFE_S)
        self._tokens = self._tokens * decay + num_tokens
        self._seconds = self._seconds * decay + seconds
        self._token_seconds = self._token_seconds * decay + num_tokens * seconds


class Overload:
    """Which requests are too many at present: those like one that was refused for its deadline a moment ago."""

    def __init__(self) -> None:
        self._until = -inf
        self._below_s = 0.0

    def concerns(self, now: float, time_left_s: float) -> bool:
        """Whether requests with such a time to their deadline are too many."""
        return now < self._until and time_left_s < self._below_s

    def note_refusal(self, now: float, time_left_s: float) -> None:
        """Remember that a request was refused because of those that wait before it."""
        if time_left_s > PATIENT_S:
            return
        below_s = time_left_s if self.concerns(now, time_left_s) else SIMILAR_DEADLINE * time_left_s
        self._below_s = max(below_s, self._below_s if now < self._until else 0.0)
        self._until = max(self._until, now + REMEMBERED_SHARE * time_left_s)


class Admission:
    """Reservations of requests whose tokens are not counted yet.

    Args:
        max_waiting_tokens: requests that would exceed it are refused.
        batch_tokens: budget of a pass, and so the most tokens that the pass has which runs when a request arrives.
    """

    def __init__(self, max_waiting_tokens: int, batch_tokens: int = 0) -> None:
        self.throughput = Throughput()
        self._batch_tokens = batch_tokens
        self.num_reserved_tokens = 0
        self._max_waiting_tokens = max_waiting_tokens
        self._overload = Overload()
        self._reserved: dict[Hashable, int] = {}

    def reserve(
        self,
        request: Hashable,
        num_tokens: int,
        num_queued_tokens: int,
        *,
        now: float = 0.0,
        time_left_s: float = inf,
        tokens_before: Callable[[int], int] = lambda _: 0,
    ) -> None:
        """Reserve room for a request; cheap, because under overload nothing else is done for it.

        If the queue is empty, any request is admitted, so that no legal request is refused permanently.

        Args:
            request: a key without a reservation.
            num_tokens: an estimate of the request's tokens; of a scattered request, of those for this engine.
            num_queued_tokens: tokens in the queue, reservations not included.
            now: seconds of any clock that does not go back.
            time_left_s: seconds until the request's deadline.
            tokens_before: returns how many queued tokens are computed before a request of so many tokens is finished;
                called only where all that waits might take too long.

        Raises:
            Overloaded: the waiting tokens would exceed the limit, or the engine at its recent throughput would need
                more than `USED_SHARE` of the time to the deadline; and for a while after such a refusal, more than
                `OVERLOAD_SHARE` for what is computed before. ``retry_after_s`` is the time in which the engine computes
                the excess, or all that waits if that is less.
        """
        waiting = self.num_reserved_tokens + num_queued_tokens
        excess = waiting + num_tokens - self._max_waiting_tokens
        if waiting and excess > 0:
            raise Overloaded(
                f"{waiting} tokens wait and {num_tokens} more would; the limit is {self._max_waiting_tokens}.",
                retry_after_s=self._seconds_for(min(excess, waiting)),
            )
        if waiting:
            self._refuse_what_comes_late(num_tokens, waiting, now, time_left_s, tokens_before)
        self._reserved[request] = num_tokens
        self.num_reserved_tokens += num_tokens

    def release(self, request: Hashable) -> None:
        """End the reservation of a request, if it has one."""
        self.num_reserved_tokens -= self._reserved.pop(request, 0)

    def _refuse_what_comes_late(
        self, num_tokens: int, waiting: int, now: float, time_left_s: float, tokens_before: Callable[[int], int]
    ) -> None:
        speed = self.throughput.tokens_per_s
        # Small passes have a low throughput, so a full budget at their throughput would take far too long: every
        # request but one would be refused, and passes would stay small.
        running = min(self._batch_tokens, self.throughput.pass_tokens)
        usable_s = USED_SHARE * time_left_s
        are_too_many = self._overload.concerns(now, time_left_s)
        if not speed or ((waiting + num_tokens + running) / speed <= usable_s and not are_too_many):
            return
        before = tokens_before(num_tokens) + sum(min(tokens, num_tokens) for tokens in self._reserved.values())
        wait_s, longest_wait_s = min(before, waiting) / speed, OVERLOAD_SHARE * time_left_s
        seconds = wait_s + (num_tokens + running) / speed
        excess_s = max(seconds - usable_s, wait_s - longest_wait_s if are_too_many else 0.0)
        if excess_s <= 0:
            return
        if wait_s > longest_wait_s:
            self._overload.note_refusal(now, time_left_s)
        if seconds > usable_s:
            reason = f"so the answer would come after {seconds:.3g} s or more; {time_left_s:.3g} s are left."
        else:
            reason = f"for {wait_s:.3g} s; under overload at most {longest_wait_s:.3g} s may be computed before this."
        raise Overloaded(f"{waiting} tokens wait, {reason}", retry_after_s=min(excess_s, waiting / speed))

    def _seconds_for(self, num_tokens: int) -> float:
        tokens_per_s = self.throughput.tokens_per_s
        return num_tokens / tokens_per_s if tokens_per_s else DEFAULT_RETRY_AFTER_S
