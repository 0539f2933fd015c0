"""Properties of the queue: every sequence leaves once, within the budget, in a fair order, with its prefix group."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import Overloaded
from service.records import BatchCost, TokenSequence
from service.scheduling.admission import DEFAULT_RETRY_AFTER_S, Throughput
from service.scheduling.budget import BatchBudget, batch_cost
from service.scheduling.flows import MAX_SKIPPED_BATCHES, OVERTAKE_LIMIT_RATIO, Entry
from service.scheduling.padded_batch import select_similar_lengths
from service.scheduling.prefix_tree import common_prefix_length, plan_prefix_sharing, shareable_tokens
from service.scheduling.queue import Queue

LAW = settings(max_examples=60, deadline=None)
"""Without a deadline, because how long a case takes on a busy machine is not tested here."""

FOREVER = float("inf")
PACKED = BatchBudget("packed", max_tokens=100, max_sequences=16)
PADDED = BatchBudget("padded", max_tokens=100, max_sequences=16)


def sequence(num_tokens: int) -> TokenSequence:
    return TokenSequence(tuple(range(num_tokens)))


def put(
    queue: Queue,
    request: str,
    lengths: Sequence[int],
    prefixes: Sequence[Hashable] | None = None,
    *,
    now: float = 0.0,
    deadline: float = FOREVER,
) -> None:
    distinct: list[Hashable] = [(request, index) for index in range(len(lengths))]
    keys = distinct if prefixes is None else prefixes
    queue.put(request, [sequence(n) for n in lengths], keys, now=now, deadline=deadline)


def new_queue(max_waiting_tokens: int = 10**9) -> Queue:
    return Queue(max_waiting_tokens, batch_tokens=PACKED.max_tokens)


def take(queue: Queue, budget: BatchBudget = PACKED, now: float = 0.0) -> tuple[Entry, ...]:
    return queue.take_batch(now, budget).entries


def drain(queue: Queue, budget: BatchBudget = PACKED) -> list[tuple[Entry, ...]]:
    batches = []
    while batch := take(queue, budget):
        batches.append(batch)
    return batches


def names(batch: Sequence[Entry]) -> list[tuple[object, int]]:
    return [(entry.request, entry.index) for entry in batch]


# --- Properties for any work -----------------------------------------------------------------------------------------

requests = st.lists(
    st.lists(st.tuples(st.integers(1, 100), st.integers(0, 3)), min_size=1, max_size=12), min_size=1, max_size=12
)
budgets = st.builds(
    BatchBudget, st.sampled_from(["packed", "padded"]), st.integers(100, 400), st.integers(min_value=1, max_value=20)
)


@LAW
@given(requests, budgets)
def test_each_sequence_leaves_exactly_once_within_the_budget(
    work: list[list[tuple[int, int]]], budget: BatchBudget
) -> None:
    """For any work no sequence is lost or taken twice, and no batch costs more than the budget."""
    queue = new_queue()
    for name, items in enumerate(work):
        put(queue, str(name), [n for n, _ in items], [prefix for _, prefix in items])

    batches = drain(queue, budget)

    left = Counter(name for batch in batches for name in names(batch))
    assert left == Counter((str(name), index) for name, items in enumerate(work) for index in range(len(items)))
    for batch in batches:
        assert batch_cost([entry.num_tokens for entry in batch], budget.cost) <= budget.max_tokens
        assert len(batch) <= budget.max_sequences
    assert (len(queue), queue.num_waiting_tokens, queue.oldest_arrival) == (0, 0, None)


@LAW
@given(requests, budgets, st.data())
def test_no_cancelled_and_no_expired_sequence_is_computed(
    work: list[list[tuple[int, int]]], budget: BatchBudget, data: st.DataObject
) -> None:
    """A request that is cancelled or expires is in no later batch, and all sequences of the others leave."""
    queue = new_queue()
    deadlines = data.draw(st.lists(st.sampled_from([2.5, FOREVER]), min_size=len(work), max_size=len(work)))
    cancelled_at = data.draw(st.lists(st.sampled_from([0, 1, 4, 999]), min_size=len(work), max_size=len(work)))
    for name, items in enumerate(work):
        put(queue, str(name), [n for n, _ in items], [p for _, p in items], deadline=deadlines[name])

    computed: Counter[object] = Counter()
    expired: Counter[object] = Counter()
    cancelled: Counter[object] = Counter()
    for now in count():
        for name, moment in enumerate(cancelled_at):
            if moment == now:
                cancelled[str(name)] += queue.cancel(str(name))
        if not len(queue):
            break
        taken = queue.take_batch(float(now), budget)
        for entry in taken.entries:
            assert entry.deadline > now
            assert cancelled_at[int(str(entry.request))] > now
            computed[entry.request] += 1
        expired.update(entry.request for entry in taken.expired)
    for name, items in enumerate(work):
        assert computed[str(name)] + expired[str(name)] + cancelled[str(name)] == len(items)
        if deadlines[name] == FOREVER:
            assert not expired[str(name)]
    assert queue.num_waiting_tokens == 0


@LAW
@given(st.lists(st.integers(5, 50), min_size=2, max_size=8), st.integers(20, 100))
def test_requests_that_all_wait_are_served_equally(lengths: list[int], num_batches: int) -> None:
    """While requests wait, the tokens computed for each differ by no more than a few of the largest groups."""
    queue = new_queue()
    for name, length in enumerate(lengths):
        put(queue, str(name), [length] * (num_batches * PACKED.max_tokens // length))

    served: Counter[object] = Counter()
    for _ in range(num_batches // len(lengths)):
        for entry in take(queue):
            served[entry.request] += entry.num_tokens

    spread = max(served.values()) - min(served[str(name)] for name in range(len(lengths)))
    assert spread <= PACKED.max_tokens + 2 * max(lengths)


@LAW
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=40),
    st.integers(1, 9),
)
def test_groups_that_fit_leave_together(groups: list[int], length: int) -> None:
    """Sequences of one prefix and one request are never split between batches when a batch can hold all of them."""
    queue = new_queue()
    put(queue, "one", [length] * len(groups), groups)
    budget = BatchBudget("packed", max_tokens=length * len(groups), max_sequences=max(Counter(groups).values()))

    batches = drain(queue, budget)

    batches_of: dict[int, set[int]] = {}
    for number, batch in enumerate(batches):
        for entry in batch:
            batches_of.setdefault(groups[entry.index], set()).add(number)
    assert all(len(numbers) == 1 for numbers in batches_of.values())


# --- Fairness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [PACKED, PADDED], ids=["packed", "padded"])
def test_small_new_request_is_in_the_next_batch(budget: BatchBudget) -> None:
    """A request of one item never waits behind requests of a thousand items."""
    queue = new_queue()
    for bulk in ("a", "b", "c"):
        put(queue, bulk, [40] * 1024)
    for _ in range(7):
        take(queue, budget)
    put(queue, "small", [30])

    assert ("small", 0) in names(take(queue, budget))


def test_stream_of_new_requests_does_not_starve_a_large_one() -> None:
    """Each new request is served first, but a request that was skipped too often is served before them."""
    queue = new_queue()
    put(queue, "bulk", [90] * 4)
    served_at = []
    for batch in range(20 * MAX_SKIPPED_BATCHES):
        put(queue, f"{batch}-a", [50])
        put(queue, f"{batch}-b", [50])
        if any(entry.request == "bulk" for entry in take(queue)):
            served_at.append(batch)

    assert served_at[0] == MAX_SKIPPED_BATCHES
    assert len(served_at) == 4


def test_skipped_requests_are_served_first_in_few_batches() -> None:
    """Even if many large requests were skipped too often, small new ones are nearly always in the next batch."""
    queue = new_queue()
    for bulk in range(60):
        put(queue, f"bulk-{bulk}", [90] * 8)
    for _ in range(2 * MAX_SKIPPED_BATCHES):
        take(queue)

    at_once = 0
    for number in range(40):
        put(queue, f"small-{number}", [80])
        at_once += names(take(queue)) == [(f"small-{number}", 0)]
        take(queue)

    assert at_once >= 30


def test_a_late_request_gets_no_compensation_for_the_past() -> None:
    """A large request that arrives late gets an equal share from then on, and no compensation for the time before."""
    queue = new_queue()
    put(queue, "old", [10] * 1000)
    for _ in range(50):
        take(queue)
    put(queue, "new", [10] * 1000)

    served = Counter(entry.request for _ in range(10) for entry in take(queue))

    assert served["old"] == served["new"] == 50


def test_of_equally_served_requests_the_smaller_goes_first() -> None:
    """Of two requests that were not served yet, the smaller is served first, though it arrived second."""
    queue = new_queue()
    put(queue, "large", [60] * 10)
    put(queue, "small", [60])

    assert names(take(queue))[0] == ("small", 0)


def test_requests_of_similar_size_leave_in_order_of_arrival() -> None:
    """Of requests of similar size, none waits for one that arrived later."""
    queue = new_queue()
    put(queue, "longer", [60])
    put(queue, "short", [50])
    put(queue, "short too", [50])
    take(queue)
    put(queue, "shorter", [55])

    assert [entry.request for entry in take(queue)] == ["longer"]


@LAW
@given(length=st.integers(60, 100), others=st.lists(st.integers(20, 50), min_size=60, max_size=60))
def test_overtaking_ends_in_proportion_to_size(length: int, others: list[int]) -> None:
    """However short the later requests are, a request leaves once a few times its own tokens were computed."""
    queue = new_queue()
    put(queue, "waiting", [length])
    num_computed = 0
    for name, other in enumerate(others):
        for copy in range(3):
            put(queue, f"{name} {copy}", [other])
        batch = take(queue)
        if any(entry.request == "waiting" for entry in batch):
            break
        num_computed += sum(entry.num_tokens for entry in batch)

    assert num_computed <= OVERTAKE_LIMIT_RATIO * length + 2 * PACKED.max_tokens


@pytest.mark.parametrize("budget", [PACKED, PADDED], ids=["packed", "padded"])
def test_single_items_from_few_connections_wait_equally_long(budget: BatchBudget) -> None:
    """If clients each send one item after the other, no item waits much longer than the mean."""
    queue, lengths = new_queue(), cycle([5, 90, 10, 40, 20, 7, 60, 15, 30, 25, 12])
    waiting_since = dict.fromkeys(range(24), 0)
    waits: list[int] = []
    for connection in waiting_since:
        put(queue, f"{connection} 0", [next(lengths)])
    for batch in range(1, 400):
        for entry in take(queue, budget):
            connection = int(str(entry.request).split()[0])
            waits.append(batch - waiting_since[connection])
            waiting_since[connection] = batch
            put(queue, f"{connection} {batch}", [next(lengths)])

    assert max(waits) <= 2.5 * sum(waits) / len(waits)


# --- Prefix groups ---------------------------------------------------------------------------------------------------


def test_one_prompt_of_several_requests_shares_a_batch() -> None:
    """One-item requests of one prompt share a batch, though requests of other prompts arrived between them."""
    queue = new_queue()
    for name in range(4):
        put(queue, f"prompt-{name}", [10], ["prompt"])
        put(queue, f"other-{name}", [10])

    batch = take(queue, BatchBudget("packed", max_tokens=80, max_sequences=8))

    assert [entry.request for entry in batch[:4]] == [f"prompt-{name}" for name in range(4)]


def test_same_prefix_leaves_half_of_the_batch_to_the_fair_order() -> None:
    """A frequent prompt cannot fill a batch while other requests wait."""
    queue = new_queue()
    put(queue, "prompt", [10], ["prompt"])
    put(queue, "other", [10])
    for name in range(30):
        put(queue, f"prompt-{name}", [10], ["prompt"])

    batch = take(queue)

    assert [entry.request for entry in batch[:7]] == ["prompt", *(f"prompt-{name}" for name in range(5)), "other"]
    assert len(batch) == 10


def test_group_larger_than_the_budget_fills_several_batches() -> None:
    """A group that no batch can hold is split, in order, into full batches."""
    queue = new_queue()
    put(queue, "one", [10] * 25, ["prompt"] * 25)

    batches = drain(queue)

    assert [len(batch) for batch in batches] == [10, 10, 5]
    assert [entry.index for batch in batches for entry in batch] == list(range(25))


def test_group_that_does_not_fit_leaves_its_room_to_the_next_request() -> None:
    """A group that fits only the next batch waits for it, and smaller work of other requests uses the room."""
    queue = new_queue()
    put(queue, "groups", [30] * 4, ["x", "x", "y", "y"])
    put(queue, "loose", [30] * 5)
    take(queue)

    batches = drain(queue)

    together = [{entry.index for entry in batch if entry.request == "groups"} for batch in batches]
    assert all(indices in ({0, 1}, {2, 3}, set()) for indices in together)


# --- Cost of shared prefixes -----------------------------------------------------------------------------------------

MIN_SHARED_PREFIX_TOKENS = 4


def answers(prompt: int, num_prompt_tokens: int, lengths: Sequence[int], first: int = 0) -> list[TokenSequence]:
    """Return answers to one prompt that differ in their first token; prompts differ in their second."""
    ids = (7, prompt, *range(2, num_prompt_tokens))[:num_prompt_tokens]
    return [
        TokenSequence((*ids, 1000 + first + index, *range(length - 1)), num_prompt_tokens)
        for index, length in enumerate(lengths)
    ]


def put_answers(queue: Queue, request: str, sequences: Sequence[TokenSequence]) -> None:
    prefixes = [hash(sequence.token_ids[: sequence.num_prompt_tokens]) for sequence in sequences]
    queue.put(request, sequences, prefixes, now=0.0, deadline=FOREVER)


def computed_tokens(batch: Sequence[Entry]) -> int:
    """Return the tokens that a pass over the tree of shared prefixes computes."""
    branches = plan_prefix_sharing([entry.sequence.token_ids for entry in batch], MIN_SHARED_PREFIX_TOKENS)
    return sum(branch.num_own for branch in branches)


def test_a_shared_prompt_costs_once() -> None:
    """A prompt counts once for all its completions, and once for each where the engine shares no prefixes."""
    work = answers(1, 20, [10] * 8)
    sharing, plain = Queue(10**9, MIN_SHARED_PREFIX_TOKENS), Queue(10**9)
    put_answers(sharing, "one", work)
    put_answers(plain, "one", work)

    assert [len(batch) for batch in drain(sharing, PACKED)] == [8]
    assert [len(batch) for batch in drain(plain, PACKED)] == [3, 3, 2]


def test_short_prefixes_cost_in_full() -> None:
    """Prefixes that are too short to be shared count in full."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    put_answers(queue, "one", answers(1, MIN_SHARED_PREFIX_TOKENS - 1, [30] * 4))

    assert [len(batch) for batch in drain(queue, PACKED)] == [3, 1]


def test_a_split_group_costs_its_prompt_in_each_batch() -> None:
    """Each batch of a group that is too large for one computes the prompt again, and its cost includes it."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    put_answers(queue, "one", answers(1, 40, [20] * 7))

    batches = drain(queue)

    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert [computed_tokens(batch) for batch in batches] == [100, 100, 60]


def test_further_requests_of_a_prompt_cost_their_completions_alone() -> None:
    """One-item requests of one prompt fill a batch together, and the prompt counts once."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    for name in range(5):
        put_answers(queue, str(name), answers(1, 60, [8], first=name))

    batches = drain(queue)

    assert [len(batch) for batch in batches] == [5]
    assert computed_tokens(batches[0]) == 100


def test_fairness_counts_computed_tokens() -> None:
    """Completions of one prompt cost less than completions of as many prompts, so more of them are served."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    put_answers(queue, "group", answers(1, 40, [10] * 64))
    put_answers(queue, "loose", [answers(prompt, 40, [10])[0] for prompt in range(2, 66)])

    served = Counter(entry.request for _ in range(8) for entry in take(queue))

    assert served["group"] > 2 * served["loose"] > 0


shared_work = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=12),
    min_size=1,
    max_size=8,
)


@LAW
@given(shared_work, st.integers(100, 300), st.booleans())
def test_no_batch_computes_more_than_its_budget(
    work: list[list[tuple[int, int, int]]], max_tokens: int, prompts_known: bool
) -> None:
    """For any nesting of prompts the tree of a batch has no more tokens than the budget, and everything leaves."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    num_items = 0
    for name, items in enumerate(work):
        sequences = [answers(p, n, [length], first=number)[0] for number, (p, n, length) in enumerate(items)]
        if not prompts_known:
            sequences = [TokenSequence(sequence.token_ids) for sequence in sequences]
        prefixes = [hash(sequence.token_ids[:6]) for sequence in sequences]
        queue.put(str(name), sequences, prefixes, now=0.0, deadline=FOREVER)
        num_items += len(items)

    batches = drain(queue, BatchBudget("packed", max_tokens, 16))

    assert sum(map(len, batches)) == num_items
    assert all(computed_tokens(batch) <= max_tokens for batch in batches)


# --- Cost of cached prefixes -----------------------------------------------------------------------------------------


@dataclass
class PrefixCache:
    """Prefixes that an engine has cached."""

    prefixes: list[tuple[int, ...]]

    limits: dict[tuple[int, ...], int] = field(default_factory=dict)
    """The maximum of cached tokens that a pass may take, for some sequences."""

    def num_cached_tokens(self, sequence: TokenSequence) -> int:
        """Return the leading tokens of a sequence that a pass need not compute."""
        ids = sequence.token_ids
        found = max((common_prefix_length(prefix, ids) for prefix in self.prefixes), default=0)
        return shareable_tokens(min(found, self.limits.get(ids, len(ids) - 1)), MIN_SHARED_PREFIX_TOKENS)

    def computed_tokens(self, batch: Sequence[Entry]) -> int:
        """Return the tokens that a pass over the entries computes."""
        distinct = list({entry.sequence.token_ids: None for entry in batch})
        cached = [(0, self.num_cached_tokens(TokenSequence(ids))) for ids in distinct]
        branches = plan_prefix_sharing(distinct, MIN_SHARED_PREFIX_TOKENS, cached)
        return sum(branch.num_own for branch in branches)


def test_answers_to_cached_prompts_fill_a_batch() -> None:
    """One-item requests of different cached prompts cost their completions alone."""
    prompts = [answers(prompt, 40, [10])[0] for prompt in range(9)]
    cache = PrefixCache([sequence.token_ids[:40] for sequence in prompts])
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    for name, sequence in enumerate(prompts):
        put_answers(queue, str(name), [sequence])

    batch = queue.take_batch(0.0, PACKED, cache.num_cached_tokens).entries

    assert len(batch) == 9
    assert cache.computed_tokens(batch) == 90


def test_a_cached_prompt_counts_for_a_whole_group() -> None:
    """A group with a cached prompt costs its completions, and leaves whole where they fit."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    group = answers(1, 80, [10] * 8)
    put_answers(queue, "group", group)

    batch = queue.take_batch(0.0, PACKED, PrefixCache([group[0].token_ids[:80]]).num_cached_tokens).entries

    assert len(batch) == 8


def test_a_group_that_the_cache_makes_more_expensive_still_leaves() -> None:
    """Sequences that cannot use the cache may cost more than their group without one; the queue never stalls."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    group = answers(1, 20, [1, 1, 1, 1])
    cache = PrefixCache([group[0].token_ids[:20]], {group[1].token_ids: 0, group[3].token_ids: 0})
    put_answers(queue, "group", group)
    budget = BatchBudget("packed", max_tokens=30, max_sequences=16)

    batches = [queue.take_batch(0.0, budget, cache.num_cached_tokens).entries for _ in range(2)]

    assert [len(batch) for batch in batches] == [3, 1]
    assert all(cache.computed_tokens(batch) <= 30 for batch in batches)
    assert len(queue) == 0


@LAW
@given(shared_work, st.integers(100, 300), st.booleans(), st.data())
def test_no_batch_computes_more_than_its_budget_however_much_is_cached(
    work: list[list[tuple[int, int, int]]], max_tokens: int, prompts_known: bool, data: st.DataObject
) -> None:
    """The cost is never too low, whatever is cached, and also if some sequences must compute cached tokens."""
    queue = Queue(10**9, MIN_SHARED_PREFIX_TOKENS)
    cache = PrefixCache([])
    for name, items in enumerate(work):
        sequences = [answers(p, n, [length], first=number)[0] for number, (p, n, length) in enumerate(items)]
        if not prompts_known:
            sequences = [TokenSequence(sequence.token_ids) for sequence in sequences]
        prefixes = [hash(sequence.token_ids[:6]) for sequence in sequences]
        queue.put(str(name), sequences, prefixes, now=0.0, deadline=FOREVER)
        for sequence in sequences:
            if data.draw(st.booleans()):
                cache.prefixes.append(sequence.token_ids[: data.draw(st.integers(1, sequence.num_tokens))])
            if data.draw(st.booleans()):
                cache.limits[sequence.token_ids] = data.draw(st.integers(0, sequence.num_tokens - 1))
    num_items = sum(map(len, work))

    while batch := queue.take_batch(0.0, BatchBudget("packed", max_tokens, 16), cache.num_cached_tokens).entries:
        num_items -= len(batch)
        assert cache.computed_tokens(batch) <= max_tokens

    assert num_items == 0


# --- Padding ---------------------------------------------------------------------------------------------------------


def test_padded_batch_has_similar_lengths() -> None:
    """The first sequence is batched with those nearest to it in length, so that little padding is computed."""
    lengths = [40, 10, 400, 39, 12, 41, 380, 11]

    chosen = select_similar_lengths(lengths, BatchBudget("padded", 123, 16))

    assert sorted(lengths[index] for index in chosen) == [39, 40, 41]


def test_padded_batch_of_mixed_lengths_wastes_little() -> None:
    """In a long queue of mixed lengths less than a tenth of the computed tokens is padding."""
    queue = new_queue()
    for name in range(16):
        put(queue, str(name), [20 + (37 * index + 101 * name) % 480 for index in range(64)])
    budget = BatchBudget("padded", max_tokens=4096, max_sequences=512)

    lengths = [[entry.num_tokens for entry in batch] for batch in drain(queue, budget)]

    computed = sum(batch_cost(batch, "padded") for batch in lengths)
    assert sum(map(sum, lengths)) / computed > 0.9


@LAW
@given(st.lists(st.integers(1, 90), min_size=1, max_size=60))
def test_padded_batch_includes_the_first_sequence_and_fits(lengths: list[int]) -> None:
    """The sequence that is served first is always in the batch, and the padded cost is within the budget."""
    chosen = select_similar_lengths(lengths, PADDED)

    assert 0 in chosen
    assert len(set(chosen)) == len(chosen) <= PADDED.max_sequences
    assert batch_cost([lengths[index] for index in chosen], "padded") <= PADDED.max_tokens


# --- Limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [PACKED, PADDED], ids=["packed", "padded"])
def test_sequence_over_the_budget_goes_alone(budget: BatchBudget) -> None:
    """An admitted sequence that is longer than the budget is computed, in a batch of its own."""
    queue = new_queue()
    put(queue, "long", [250, 10, 250])

    assert [[entry.num_tokens for entry in batch] for batch in drain(queue, budget)].count([250]) == 2
    assert len(queue) == 0


def test_an_empty_queue_admits_any_request() -> None:
    """The limit on waiting tokens cannot refuse a legal request for good: it is admitted where nothing waits."""
    queue = new_queue(max_waiting_tokens=100)

    queue.admit("huge", 10**6)

    assert queue.num_waiting_tokens == 10**6


def test_refusal_returns_when_there_will_be_room() -> None:
    """Retry-After is the excess over the limit divided by the throughput, at most the time to empty the queue."""
    queue = new_queue(max_waiting_tokens=100)
    queue.record_throughput(50, seconds=5.0)
    queue.admit("first", 80)

    with pytest.raises(Overloaded) as excess:
        queue.admit("second", 40)
    with pytest.raises(Overloaded) as whole:
        queue.admit("third", 1000)

    assert excess.value.retry_after_s == pytest.approx(2.0)
    assert whole.value.retry_after_s == pytest.approx(8.0)
    assert queue.num_waiting_tokens == 80


def test_refusal_before_any_measurement_returns_the_default() -> None:
    """Without a measured throughput Retry-After is a constant."""
    queue = new_queue(max_waiting_tokens=100)
    queue.admit("first", 100)

    with pytest.raises(Overloaded) as refusal:
        queue.admit("second", 1)

    assert refusal.value.retry_after_s == DEFAULT_RETRY_AFTER_S


def test_reservation_is_replaced_by_the_counted_tokens() -> None:
    """The estimate reserves room until the tokens are known; leaving and cancelling free it."""
    queue = new_queue(max_waiting_tokens=100)
    queue.admit("first", 90)
    put(queue, "first", [20, 30])
    assert queue.num_waiting_tokens == 50

    queue.admit("second", 50)
    queue.cancel("second")
    take(queue)

    assert queue.num_waiting_tokens == 0


def test_recent_throughput_outweighs_earlier_measurements() -> None:
    """When the engine slows down, the estimate follows within seconds of engine time."""
    throughput = Throughput()
    throughput.record(10_000, seconds=10.0)
    throughput.record(1_000, seconds=10.0)

    assert throughput.tokens_per_s == pytest.approx((10_000 / 2 + 1_000) / 15)


def test_halved_budget_is_never_empty() -> None:
    """Halving stops at one token: then every sequence gets a batch of its own."""
    budget = BatchBudget("packed", 4096, 512)

    assert [budget.halved().max_tokens, BatchBudget("packed", 1, 512).halved().max_tokens] == [2048, 1]


# --- Time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_requests", [1, 100_000], ids=["one-request", "one-item-requests"])
@pytest.mark.parametrize("cost", ["packed", "padded"])
def test_taking_a_batch_is_not_slower_from_a_long_queue(num_requests: int, cost: BatchCost) -> None:
    """Taking a batch out of 100,000 waiting sequences takes as long as out of 1,000, apart from noise."""

    def seconds_per_batch(num_entries: int) -> float:
        queue = new_queue()
        per_request = max(1, num_entries // num_requests)
        for name in range(num_entries // per_request):
            put(queue, str(name), [8] * per_request, [index // 4 for index in range(per_request)])
        budget = BatchBudget(cost, max_tokens=512, max_sequences=64)
        times = []
        for _ in range(12):
            begin = time.process_time()
            take(queue, budget)
            times.append(time.process_time() - begin)
        return sorted(times)[len(times) // 2]

    assert seconds_per_batch(100_000) < 8 * seconds_per_batch(1_000) + 0.001


def test_ten_thousand_cancels_leave_nothing_behind() -> None:
    """Requests that are cancelled while they wait do not change the order of the others, and free their memory."""
    queue = new_queue()
    stay = [100 - length for length in range(40)]
    for length in stay:
        put(queue, f"stays-{length}", [length])
    for name in range(10_000):
        put(queue, str(name), [150, 150], ["a", "b"])
        queue.cancel(str(name))

    assert len(queue) == len(queue._flows._by_prefix) == 40
    assert len(queue._flows._heap) < 200
    everything = take(queue, BatchBudget("packed", max_tokens=10_000, max_sequences=100))
    assert [entry.num_tokens for entry in everything] == sorted(stay)


# --- Shutdown --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [PACKED, PADDED], ids=["packed", "padded"])
def test_a_shutdown_finishes_whole_requests(budget: BatchBudget) -> None:
    """Requests that advanced together are finished one by one, the one with the fewest tokens left first."""
    queue = new_queue()
    for number, num_sequences in enumerate((12, 20, 8, 16)):
        put(queue, f"request {number}", [50] * num_sequences, prefixes=["prompt"] * num_sequences)
    served = {entry.request for _ in range(4) for entry in take(queue, budget)}
    assert served == {f"request {number}" for number in range(4)}

    queue.finish_one_by_one()
    put(queue, "late", [50])
    order = [entry.request for batch in drain(queue, budget) for entry in batch]

    expected: list[Hashable] = ["late", "request 2", "request 0", "request 3", "request 1"]
    assert order == sorted(order, key=expected.index)
