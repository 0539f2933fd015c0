"""The index of cached prefixes: slots hold the tokens of their prefixes, and the least recently used one is evicted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engines.attention import prefix_index
from service.engines.attention.prefix_index import CachedPrefix, PrefixIndex
from service.scheduling.prefix_tree import common_prefix_length

LAW = settings(max_examples=150, deadline=None)

token_ids = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)


def add(index: PrefixIndex, tokens: tuple[int, ...]) -> CachedPrefix | None:
    """Add a prefix in a pass of its own."""
    index.begin_pass()
    added = index.add(tokens)
    return added[0] if added else None


@LAW
@given(st.lists(st.lists(token_ids, max_size=4), max_size=12), st.integers(1, 24), st.integers(1, 3), st.data())
def test_a_slot_holds_the_token_of_all_its_prefixes(
    passes: list[list[tuple[int, ...]]], num_slots: int, min_tokens: int, data: st.DataObject
) -> None:
    """Whatever is added, evicted or rolled back, a prefix's slots hold its tokens, and free slots are counted."""
    index = PrefixIndex(num_slots, min_tokens)
    written: dict[int, int] = {}
    cached: list[CachedPrefix] = []
    for prefixes_of_pass in passes:
        index.begin_pass()
        added: list[CachedPrefix] = []
        for tokens in prefixes_of_pass:
            found = index.add(tokens)
            if found:
                prefix, num_known = found
                written.update(zip(prefix.slots[num_known:].tolist(), tokens[num_known:], strict=True))
                added.append(prefix)
        is_rolled_back: bool = data.draw(st.booleans()) if added else False
        if is_rolled_back:
            for prefix in added:
                index.remove(prefix)
        cached = list(index._sorted)
        for prefix in cached:
            assert tuple(written[slot] for slot in prefix.slots.tolist()) == prefix.tokens
        assert index.num_tokens == len({slot for prefix in cached for slot in prefix.slots.tolist()}) <= num_slots
    assert [prefix.tokens for prefix in cached] == sorted({prefix.tokens for prefix in cached})


@LAW
@given(st.lists(token_ids, max_size=8), token_ids, st.integers(0, 9))
def test_the_longest_prefix_is_found(cached: list[tuple[int, ...]], tokens: tuple[int, ...], limit: int) -> None:
    """A lookup finds as many common tokens as any cached prefix has, up to its limit, and none below the minimum."""
    index = PrefixIndex(100, min_tokens=2)
    for prefix_tokens in cached:
        add(index, prefix_tokens)

    prefix, num_common = index.longest(tokens, limit)

    most = max((common_prefix_length(known, tokens) for known in cached if len(known) >= 2), default=0)
    most = min(most, limit)
    assert num_common == (most if most >= 2 else 0)
    assert (prefix is None) == (num_common == 0)
    assert prefix is None or prefix.tokens[:num_common] == tokens[:num_common]


@LAW
@given(st.lists(token_ids, max_size=12), st.lists(token_ids, min_size=1, max_size=4), st.integers(1, 16), st.data())
def test_a_repeated_lookup_is_never_stale(
    passes: list[tuple[int, ...]], sequences: list[tuple[int, ...]], num_slots: int, data: st.DataObject
) -> None:
    """Whatever was added, evicted or removed since, a lookup returns what a lookup of equal, new token ids returns."""
    index = PrefixIndex(num_slots, min_tokens=1)
    for tokens in passes:
        added = add(index, tokens)
        if added is not None and data.draw(st.booleans()):
            index.remove(added)
        for sequence in sequences:
            limit = data.draw(st.integers(0, 9))
            assert index.longest(sequence, limit) == index.longest(tuple(iter(sequence)), limit)


def test_a_sequence_is_compared_once_between_two_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup of a pass reuses the comparisons of the one by which the queue computed the cost of the sequence."""
    compared: list[tuple[int, ...]] = []

    def counting(first: tuple[int, ...], second: tuple[int, ...]) -> int:
        compared.append(second)
        return common_prefix_length(first, second)

    index = PrefixIndex(100, min_tokens=2)
    add(index, (1, 2, 3))
    sequence = (1, 2, 3, 4)
    monkeypatch.setattr(prefix_index, "common_prefix_length", counting)

    assert [index.longest(sequence, limit)[1] for limit in (4, 2, 4)] == [3, 2, 3]
    assert len(compared) == 1

    index.end_lookups()
    index.longest(sequence, 4)
    assert len(compared) == 2


def test_prefixes_share_the_slots_of_their_common_part() -> None:
    """A second prompt with the same system prompt takes slots for its own tokens alone, also when the first goes."""
    index = PrefixIndex(10, min_tokens=2)
    first = add(index, (1, 2, 3, 4))
    second = add(index, (1, 2, 3, 9, 9))
    assert first is not None
    assert second is not None
    assert first.slots[:3].tolist() == second.slots[:3].tolist()
    assert index.num_tokens == 6

    index.remove(first)

    assert index.num_tokens == 5
    assert index.longest((1, 2, 3, 4), 4) == (second, 3)


def test_the_least_recently_used_prefix_is_evicted() -> None:
    """A new prompt evicts the least recently used one, not the one that was added first."""
    index = PrefixIndex(6, min_tokens=2)
    old, other = add(index, (1, 1, 1)), add(index, (2, 2, 2))
    assert old is not None
    index.begin_pass()
    index.use(old)

    new = add(index, (3, 3, 3))

    assert other is not None
    assert [index.longest(tokens, 3)[0] for tokens in ((1, 1, 1), (2, 2, 2), (3, 3, 3))] == [old, None, new]


def test_a_pass_never_evicts_what_it_uses() -> None:
    """A prefix is not cached if it would need slots that its pass uses."""
    index = PrefixIndex(4, min_tokens=2)
    cached = add(index, (1, 1, 1))
    assert cached is not None
    index.begin_pass()
    index.use(cached)

    assert index.add((2, 2, 2)) is None
    assert index.add((3,) * 5) is None
    assert index.longest((1, 1, 1), 3) == (cached, 3)


def test_slots_are_taken_contiguously() -> None:
    """Prefixes added one after the other have contiguous slots, from the lowest on again after all were removed."""
    index = PrefixIndex(5000, min_tokens=2)
    first, second = add(index, tuple(range(1500))), add(index, tuple(range(1, 1400)))
    assert first is not None
    assert second is not None
    assert [*first.slots, *second.slots] == list(range(1500 + 1399))

    index.clear()

    third = add(index, (7, 8, 9))
    assert third is not None
    assert third.slots.tolist() == [0, 1, 2]
