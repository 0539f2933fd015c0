"""The token-budget queue: which waiting sequences share the next forward pass, and whether more work may wait.

Pure: no clock, no lock, no device. The caller passes ``now``, holds the lock and runs the batch; tests pass numbers.

A pass is priced at the tokens that it computes: what its sequences begin alike counts once where the engine shares it,
and what the engine has kept of earlier passes counts nothing. The price may be a little high, where strangers begin
alike, and never low, because memory is planned by it.

Fairness is start-time fair queueing (Goyal, Vin and Cheng, 1996) between requests, in tokens: the request that has been
served least goes next, and a newcomer starts level with the least-served one, so a request of one item is in the next
batch however large its neighbours are. Among equals the smaller request goes first; one that fits a batch may be
overtaken only until a few times its own tokens were computed, so those of like size keep nearly their order of arrival.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import chain, islice
from math import inf
from typing import TypeAlias

from service.errors import Overloaded
from service.records import BatchCost, TokenSequence
from service.scheduling.prefix_tree import common_prefix_length, shareable_tokens

PATIENCE_BATCHES = 8
"""Batches that may pass a request over; then it heads one, so a stream of newcomers cannot starve it."""

OVERTAKING_RATIO = 4
"""Times its own tokens that are computed after the arrival of a request that fits a batch, until no newcomer passes."""

MAX_MISFITS = 8
"""Requests whose next group found no room before a batch is closed; bounds the search, not the fairness."""

WINDOW_BATCHES = 4
"""How many budgets of the fairest work a padded batch chooses its neighbours in length from."""

PASS_OVERHEAD_TOKENS = 256
"""What starting one more padded pass costs, in tokens it could have computed: a tiny batch may take some padding."""

THROUGHPUT_HALF_LIFE_S = 10.0
"""Engine seconds after which a measurement of the throughput counts half."""

RETRY_AFTER_UNMEASURED_S = 1.0
"""Advice of a refusal before any throughput was measured: come back soon and ask again."""


@dataclass(frozen=True, slots=True)
class BatchBudget:
    """What one forward pass may hold: tokens, priced as the engine prices them, and sequences.

    A single sequence with more tokens than the budget is legal, and has a pass of its own.
    """

    cost: BatchCost
    max_tokens: int
    max_sequences: int

    def halved(self) -> BatchBudget:
        """Return half the tokens, at least one: from there on every sequence goes alone."""
        return replace(self, max_tokens=max(self.max_tokens // 2, 1))


def batch_cost(lengths: Sequence[int], cost: BatchCost) -> int:
    """Tokens that a pass over sequences of these lengths computes: their sum, or longest x count when padded."""
    if not lengths:
        return 0
    return sum(lengths) if cost == "packed" else max(lengths) * len(lengths)


@dataclass(frozen=True, slots=True)
class Entry:
    """A sequence that waits: whose it is, its place in the request, and until when its answer is wanted.

    ``prefix`` is equal for sequences that share their prompt; ``arrived`` and ``deadline`` are on the caller's clock.
    ``num_shared``: leading tokens that need no computing in a pass that holds the entry before it in its group too.
    """

    request: Hashable
    place: int
    sequence: TokenSequence
    prefix: Hashable
    arrived: float
    deadline: float
    num_shared: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return self.sequence.num_tokens

    @property
    def num_own(self) -> int:
        """Tokens that are computed for it alone."""
        return self.num_tokens - self.num_shared


@dataclass(frozen=True, slots=True)
class TakenBatch:
    """What left the queue: entries to compute now, and entries whose deadline had passed and which cost nothing."""

    entries: tuple[Entry, ...] = ()
    expired: tuple[Entry, ...] = ()


@dataclass(slots=True)
class _Group:
    """The waiting entries of one request that share a prefix, by place, in the order in which they leave."""

    prefix: Hashable
    entries: OrderedDict[int, Entry] = field(default_factory=OrderedDict)
    num_own: int = 0
    last: TokenSequence | None = None

    @property
    def cost(self) -> int:
        """Tokens of a pass over all of it: what the first entry shares with one that has left is computed again."""
        return self.num_own + next(iter(self.entries.values())).num_shared

    def add(self, entry: Entry) -> None:
        self.entries[entry.place] = entry
        self.num_own += entry.num_own
        self.last = entry.sequence

    def remove(self, entry: Entry) -> None:
        del self.entries[entry.place]
        self.num_own -= entry.num_own


@dataclass(slots=True, eq=False)
class _Line:
    """The waiting work of one request. ``served``: its virtual time, in tokens; ``turn``: its one valid heap item.

    ``rank``: the tokens computed, ever, from which on no newcomer goes first that was served equally.
    """

    request: Hashable
    order: int
    arrived: float
    deadline: float
    served: float
    last_batch: int
    rank: float = inf
    groups: OrderedDict[Hashable, _Group] = field(default_factory=OrderedDict)
    num_entries: int = 0
    num_tokens: int = 0
    turn: _Turn | None = None

    @property
    def entries(self) -> Iterator[Entry]:
        return chain.from_iterable(group.entries.values() for group in self.groups.values())

    @property
    def first_group(self) -> _Group:
        return next(iter(self.groups.values()))


_Turn: TypeAlias = tuple[float, float, int, int, _Line]


NumCachedTokens: TypeAlias = Callable[[TokenSequence], int]
"""Tells how many leading tokens of a sequence the next pass need not compute."""


def nothing_cached(_sequence: TokenSequence) -> int:
    """Return zero, as where every pass computes all of its tokens."""
    return 0


@dataclass(frozen=True, slots=True)
class _Run:
    """Entries of one group that leave together, in order, and the tokens that a pass computes for them.

    ``last_cached``: leading tokens of the last one that the pass need not compute.
    """

    entries: tuple[Entry, ...] = ()
    cost: int = 0
    last_cached: int = 0


@dataclass(slots=True)
class _Room:
    """What a batch in the making still has room for."""

    tokens: int
    sequences: int

    def holds(self, num_tokens: int, num_sequences: int) -> bool:
        return num_tokens <= self.tokens and num_sequences <= self.sequences

    def take(self, run: _Run) -> None:
        self.tokens -= run.cost
        self.sequences -= len(run.entries)

    def at_most(self, other: _Room) -> _Room:
        return _Room(min(self.tokens, other.tokens), min(self.sequences, other.sequences))


@dataclass(slots=True)
class _Draft:
    """A packed batch in the making, the room it has left, and what of its last entry need not be computed."""

    room: _Room
    num_cached_tokens: NumCachedTokens
    entries: list[Entry] = field(default_factory=list)
    last_cached: int = 0

    def take(self, run: _Run) -> None:
        self.room.take(run)
        self.entries += run.entries
        self.last_cached = run.last_cached


class Throughput:
    """Recent tokens per engine second: a mean whose past fades with every engine second."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None until something was measured."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    def record(self, num_tokens: int, seconds: float) -> None:
        """Take in one batch: tokens computed in so many seconds of engine time."""
        kept = 0.5 ** (seconds / THROUGHPUT_HALF_LIFE_S)
        self._tokens = self._tokens * kept + num_tokens
        self._seconds = self._seconds * kept + seconds


class Queue:
    """The bounded line of sequences that wait for the engine.

    A request is admitted with an estimate of its tokens, put in when they are known, and leaves in batches. What waits
    is what was admitted or put and has not left. Not thread-safe: the caller holds a lock.

    Args:
        max_waiting_tokens: beyond it requests are refused.
        shared_from: common beginnings of at least so many tokens are computed once in a pass; None: none is.
        batch_tokens: of a usual batch: requests that fit one keep nearly their order of arrival; 0: none does.
    """

    def __init__(self, max_waiting_tokens: int, shared_from: int | None = None, *, batch_tokens: int = 0) -> None:
        self._max_waiting_tokens = max_waiting_tokens
        self._shared_from = shared_from
        self._batch_tokens = batch_tokens
        self._throughput = Throughput()
        self._reserved: dict[Hashable, int] = {}
        self._num_reserved_tokens = 0
        self._num_entries = 0
        self._num_entry_tokens = 0
        self._lines: OrderedDict[Hashable, _Line] = OrderedDict()  # in order of arrival
        self._least_recent: OrderedDict[Hashable, _Line] = OrderedDict()  # in order of last service
        self._by_prefix: dict[Hashable, OrderedDict[int, _Line]] = {}
        self._turns: list[_Turn] = []
        self._virtual_time = 0.0
        self._num_lines_ever = 0
        self._num_taken_tokens = 0
        self._num_batches = 0
        self._last_patience_batch = 0

    def __len__(self) -> int:
        return self._num_entries

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens admitted (as estimated) or put in (as counted) that have not left yet."""
        return self._num_reserved_tokens + self._num_entry_tokens

    @property
    def oldest_arrival(self) -> float | None:
        """When the request that arrived first of those waiting arrived; None when nobody waits."""
        return next(iter(self._lines.values())).arrived if self._lines else None

    # --- Admission ---------------------------------------------------------------------------------------------------

    def admit(self, request: Hashable, num_tokens: int) -> None:
        """Reserve room for a request before its tokens are known; O(1), because under overload this is all we do.

        An empty line admits any request, so a limit on waiting can never refuse a legal request for good.

        Args:
            request: a key not in use.
            num_tokens: an estimate; `put` replaces it by the truth.

        Raises:
            Overloaded: the line would grow over its limit. ``retry_after_s`` is the time the engine needs, at its
                recent speed, to work off what stands in the way of this request: the excess, at most the whole line.
        """
        waiting = self.num_waiting_tokens
        excess = waiting + num_tokens - self._max_waiting_tokens
        if waiting and excess > 0:
            raise Overloaded(
                f"{waiting} tokens wait and {num_tokens} more were sent; the limit is {self._max_waiting_tokens}.",
                retry_after_s=self._seconds_for(min(excess, waiting)),
            )
        self._reserved[request] = num_tokens
        self._num_reserved_tokens += num_tokens

    def record_throughput(self, num_tokens: int, seconds: float) -> None:
        """Tell the queue how fast the engine was; what a refusal advises rests on it."""
        self._throughput.record(num_tokens, seconds)

    def _seconds_for(self, num_tokens: int) -> float:
        tokens_per_s = self._throughput.tokens_per_s
        return num_tokens / tokens_per_s if tokens_per_s else RETRY_AFTER_UNMEASURED_S

    def _release_reservation(self, request: Hashable) -> None:
        self._num_reserved_tokens -= self._reserved.pop(request, 0)

    # --- In and out --------------------------------------------------------------------------------------------------

    def put(
        self,
        request: Hashable,
        sequences: Iterable[TokenSequence],
        prefixes: Iterable[Hashable],
        *,
        now: float,
        deadline: float,
    ) -> None:
        """Put a request's sequences into the line; its reservation ends.

        Sequences of one prefix leave together where they fit, and otherwise in the order given here.

        Args:
            request: a key that has nothing in the line.
            sequences: place 0, 1, 2... of the request.
            prefixes: one key for each sequence; equal where the prompt is shared, also between requests.
            now: when they begin to wait.
            deadline: after it none of them is computed.
        """
        self._release_reservation(request)
        self._num_lines_ever += 1
        line = _Line(request, self._num_lines_ever, now, deadline, self._newcomer_level(), self._num_batches)
        for place, (sequence, prefix) in enumerate(zip(sequences, prefixes, strict=True)):
            group = line.groups.get(prefix)
            if group is None:
                group = line.groups[prefix] = _Group(prefix)
                self._by_prefix.setdefault(prefix, OrderedDict())[line.order] = line
            num_shared = 0 if group.last is None else self._num_shared(group.last, sequence)
            group.add(Entry(request, place, sequence, prefix, now, deadline, num_shared))
            line.num_entries += 1
            line.num_tokens += sequence.num_tokens
        if not line.num_entries:
            return
        if line.num_tokens <= self._batch_tokens:
            line.rank = self._num_taken_tokens + OVERTAKING_RATIO * line.num_tokens
        self._lines[request] = self._least_recent[request] = line
        self._num_entries += line.num_entries
        self._num_entry_tokens += line.num_tokens
        self._await_turn(line)

    def _num_shared(self, before: TokenSequence, sequence: TokenSequence) -> int:
        """Return how many leading tokens a pass computes once for both, or a few less: never more than it does."""
        if self._shared_from is None:
            return 0
        ids, prompt = sequence.token_ids, sequence.num_prompt_tokens
        if prompt is not None and ids[:prompt] == before.token_ids[:prompt]:  # by far the most common, and quickly seen
            return shareable_tokens(prompt, self._shared_from)
        return shareable_tokens(common_prefix_length(before.token_ids, ids), self._shared_from)

    def cancel(self, request: Hashable) -> int:
        """Drop what a request has reserved or waiting; return the number of entries dropped. Unknown keys drop none."""
        self._release_reservation(request)
        line = self._lines.get(request)
        return len(self._drop(line)) if line else 0

    def take_batch(
        self, now: float, budget: BatchBudget, num_cached_tokens: NumCachedTokens = nothing_cached
    ) -> TakenBatch:
        """Take the next batch out of the line.

        Its first entry belongs to the least-served request (or to one that ran out of patience). A group of one prefix
        leaves whole where it fits a batch, in runs where it does not, and pulls companions of the same prefix from
        other requests along into at most half of the budget. A padded batch takes neighbours in length of its first
        entry, from the fairest work, for as long as they make the pass more efficient.

        An expired request is noticed when its turn comes; whoever gives up earlier calls `cancel`. The cost depends on
        the size of the batch, not on the length of the line.

        Args:
            now: the time against which deadlines are held.
            budget: of one pass. A single sequence over the budget goes alone: admission has promised that it can run,
                and a line that moves is kinder than one that never does.
            num_cached_tokens: of a sequence, as the engine stands now; asked for what may go into a packed batch.

        Returns:
            The batch, empty only when nobody waits in time, and the entries that left unanswered.
        """
        self._num_batches += 1
        expired: list[Entry] = []
        if budget.cost == "packed":
            entries = self._take_packed(now, budget, num_cached_tokens, expired)
        else:
            entries = self._take_padded(now, budget, expired)
        return TakenBatch(tuple(entries), tuple(expired))

    # --- Whose turn it is --------------------------------------------------------------------------------------------

    def _newcomer_level(self) -> float:
        """Return the virtual time of the least-served line, and never one that has passed already."""
        while self._turns and self._turns[0][-1].turn is not self._turns[0]:
            heappop(self._turns)
        if self._turns:
            self._virtual_time = max(self._virtual_time, self._turns[0][0])
        return self._virtual_time

    def _await_turn(self, line: _Line) -> None:
        line.turn = (line.served, line.rank, line.num_tokens, line.order, line)
        heappush(self._turns, line.turn)
        if len(self._turns) > 2 * len(self._lines) + 64:  # mostly turns of lines that were served or dropped meanwhile
            self._turns = [line.turn for line in self._lines.values() if line.turn is not None]
            heapify(self._turns)

    def _lines_by_turn(self, now: float, expired: list[Entry]) -> Iterator[_Line]:
        """Yield the lines in the order of fairness, each taken out of it; the caller puts it back if work remains."""
        if self._least_recent and self._num_batches - self._last_patience_batch > PATIENCE_BATCHES:
            line = next(iter(self._least_recent.values()))
            if self._num_batches - line.last_batch > PATIENCE_BATCHES:
                self._last_patience_batch = self._num_batches
                line.turn = None
                if not self._drop_if_expired(line, now, expired):
                    yield line
        while self._turns:
            turn = heappop(self._turns)
            line = turn[-1]
            if line.turn is not turn:
                continue
            line.turn = None
            if not self._drop_if_expired(line, now, expired):
                yield line

    def _drop_if_expired(self, line: _Line, now: float, expired: list[Entry]) -> bool:
        if line.deadline > now:
            return False
        expired += self._drop(line)
        return True

    def _drop(self, line: _Line) -> list[Entry]:
        entries = list(line.entries)
        self._remove(line, entries)
        return entries

    def _serve(self, line: _Line, run: _Run) -> None:
        """Take a run out of its line, at the cost of the line's place in the order."""
        self._remove(line, run.entries)
        line.served += run.cost
        self._num_taken_tokens += run.cost
        line.last_batch = self._num_batches
        if line.num_entries:
            self._least_recent.move_to_end(line.request)
            self._await_turn(line)

    def _remove(self, line: _Line, run: Sequence[Entry]) -> None:
        for entry in run:
            group = line.groups[entry.prefix]
            group.remove(entry)
            if not group.entries:
                del line.groups[entry.prefix]
                self._forget_prefix(entry.prefix, line)
        num_tokens = sum(entry.num_tokens for entry in run)
        line.num_entries -= len(run)
        line.num_tokens -= num_tokens
        self._num_entries -= len(run)
        self._num_entry_tokens -= num_tokens
        if not line.num_entries:
            line.turn = None
            del self._lines[line.request]
            del self._least_recent[line.request]

    def _forget_prefix(self, prefix: Hashable, line: _Line) -> None:
        lines = self._by_prefix[prefix]
        del lines[line.order]
        if not lines:
            del self._by_prefix[prefix]

    # --- Packed: whole prefix groups, fairest first ------------------------------------------------------------------

    def _take_packed(
        self, now: float, budget: BatchBudget, num_cached_tokens: NumCachedTokens, expired: list[Entry]
    ) -> list[Entry]:
        draft = _Draft(_Room(budget.max_tokens, budget.max_sequences), num_cached_tokens)
        misfits: list[_Line] = []
        room_for_companions = _Room(budget.max_tokens // 2, budget.max_sequences // 2)
        for line in self._lines_by_turn(now, expired):
            group = line.first_group
            run = self._run_of(group, draft.room, budget, draft)
            if run.entries:
                self._serve(line, run)
                draft.take(run)
                self._add_companions(draft, group.prefix, line, room_for_companions, budget, now)
            else:
                misfits.append(line)
            if not draft.room.holds(1, 1) or len(misfits) == MAX_MISFITS:
                break
        for line in misfits:
            if line.num_entries and line.turn is None:  # it may have been served since, as a companion
                self._await_turn(line)
        return draft.entries

    def _add_companions(
        self,
        draft: _Draft,
        prefix: Hashable,
        line: _Line,
        allowance: _Room,
        budget: BatchBudget,
        now: float,
    ) -> None:
        """Pull entries of the same prefix out of other lines: in the same pass the prompt is computed once for all."""
        if not draft.room.at_most(allowance).holds(1, 1):
            return
        for other in list(islice(self._by_prefix.get(prefix, {}).values(), budget.max_sequences)):
            if other is line or other.deadline <= now:
                continue
            run = self._run_of(other.groups[prefix], draft.room.at_most(allowance), budget, draft)
            if not run.entries:
                break
            self._serve(other, run)
            draft.take(run)
            allowance.take(run)

    def _run_of(self, group: _Group, room: _Room, budget: BatchBudget, draft: _Draft) -> _Run:
        """Return what of a group goes into this room: all of it; nothing, if it fits a later batch whole; else a run.

        Its first entry shares what it can with the last one of the batch so far, the others with the one before them.
        """
        entries: list[Entry] = []
        cost, before_kept = 0, draft.last_cached
        for entry in group.entries.values():
            kept = draft.num_cached_tokens(entry.sequence)
            own = entry.num_tokens - self._num_saved(entry, kept, (entries or draft.entries)[-1:], before_kept)
            if not room.holds(cost + own, len(entries) + 1) and (draft.entries or entries):
                break
            entries.append(entry)
            cost, before_kept = cost + own, kept
        fits_later = group.cost <= budget.max_tokens and len(group.entries) <= budget.max_sequences
        if len(entries) < len(group.entries) and fits_later:
            return _Run()
        return _Run(tuple(entries), cost, before_kept)

    def _num_saved(self, entry: Entry, kept: int, before: Sequence[Entry], before_kept: int) -> int:
        """Return how many tokens of an entry a pass need not compute, behind the entry before it, if there is one.

        What that one left out because it is kept, and this one cannot leave out, the pass computes for this one.
        """
        if not before:
            return kept
        same_run = before[0].request == entry.request and before[0].prefix == entry.prefix
        shared = entry.num_shared if same_run else self._num_shared(before[0].sequence, entry.sequence)
        return max(kept, shared - max(0, min(before_kept, shared) - kept))

    # --- Padded: neighbours in length --------------------------------------------------------------------------------

    def _take_padded(self, now: float, budget: BatchBudget, expired: list[Entry]) -> list[Entry]:
        window: list[tuple[Entry, _Line]] = []
        lines: list[_Line] = []
        num_tokens = 0
        for line in self._lines_by_turn(now, expired):
            lines.append(line)
            for entry in islice(line.entries, budget.max_sequences):
                window.append((entry, line))
                num_tokens += entry.num_tokens
            if num_tokens >= WINDOW_BATCHES * budget.max_tokens or len(window) >= WINDOW_BATCHES * budget.max_sequences:
                break
        if not window:
            return []
        chosen = [window[index] for index in neighbours_in_length([entry.num_tokens for entry, _ in window], budget)]
        for entry, line in chosen:
            self._serve(line, _Run((entry,), entry.num_tokens))
        for line in lines:
            if line.num_entries and line.turn is None:
                self._await_turn(line)
        return [entry for entry, _ in chosen]


def neighbours_in_length(lengths: Sequence[int], budget: BatchBudget) -> list[int]:
    """Return the positions, shortest sequence first, of a padded batch around the first of these lengths.

    The batch grows from the first sequence to the next shorter or next longer one, whichever wastes less, while it fits
    and real tokens per computed token (the start of a pass counted in) do not fall.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    first = last = order.index(0)
    real, longest = lengths[0], lengths[0]

    def efficiency(real: int, longest: int, count: int) -> float:
        return real / (longest * count + PASS_OVERHEAD_TOKENS)

    best = efficiency(real, longest, 1)
    while (count := last - first + 2) <= budget.max_sequences:
        steps: list[tuple[float, int]] = []
        if first > 0:
            shorter = lengths[order[first - 1]]
            if longest * count <= budget.max_tokens:
                steps.append((efficiency(real + shorter, longest, count), -1))
        if last + 1 < len(order):
            longer = lengths[order[last + 1]]
            if longer * count <= budget.max_tokens:
                steps.append((efficiency(real + longer, longer, count), 1))
        if not steps or max(steps)[0] < best:
            break
        best, direction = max(steps)
        first, last = (first - 1, last) if direction < 0 else (first, last + 1)
        longest = lengths[order[last]]
        real += lengths[order[first if direction < 0 else last]]
    return order[first : last + 1]


def bisect(num_sequences: int, passes: Callable[[range], bool]) -> list[int]:
    """Find the poison in a batch: halve what does not pass until the sequences that do not pass stand alone.

    One poison sequence among n costs at most 2 log2(n) + 1 passes (n a power of two); none costs one.

    Args:
        num_sequences: in the batch; runs are ranges over their positions.
        passes: tries a run and says whether it passed; each position is in exactly one run that passed or stood alone.

    Returns:
        The positions that did not pass even alone, in order.
    """
    poison: list[int] = []
    waiting = [range(num_sequences)] if num_sequences else []
    while waiting:
        run = waiting.pop()
        if passes(run):
            continue
        if len(run) == 1:
            poison.append(run[0])
        else:
            middle = len(run) // 2
            waiting += [run[middle:], run[:middle]]
    return poison
