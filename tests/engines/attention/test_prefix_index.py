"""The books of what is kept: a slot holds the token that its beginnings say, and what is used last stays longest."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engines.attention.prefix_index import CachedPrefix, PrefixIndex
from service.scheduling.prefix_tree import common_prefix_length

LAW = settings(max_examples=150, deadline=None)

beginnings = st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple)


def add(prefixes: PrefixIndex, tokens: tuple[int, ...]) -> CachedPrefix | None:
    """Add a beginning in a pass of its own."""
    prefixes.begin_pass()
    added = prefixes.add(tokens)
    return added[0] if added else None


@LAW
@given(st.lists(st.lists(beginnings, max_size=4), max_size=12), st.integers(1, 24), st.integers(1, 3), st.data())
def test_a_slot_holds_the_token_that_all_its_beginnings_say(
    passes: list[list[tuple[int, ...]]], num_slots: int, shortest: int, data: st.DataObject
) -> None:
    """Whatever is added, evicted or taken back, the slots of a kept beginning spell it, and free slots are counted."""
    prefixes = PrefixIndex(num_slots, shortest)
    written: dict[int, int] = {}
    kept: list[CachedPrefix] = []
    for beginnings_of_pass in passes:
        prefixes.begin_pass()
        added = []
        for tokens in beginnings_of_pass:
            found = prefixes.add(tokens)
            if found:
                prefix, num_known = found
                written.update(zip(prefix.slots[num_known:].tolist(), tokens[num_known:], strict=True))
                added.append(prefix)
        if added and data.draw(st.booleans()):
            for prefix in added:
                prefixes.remove(prefix)
        kept = list(prefixes._sorted)
        for prefix in kept:
            assert tuple(written[slot] for slot in prefix.slots.tolist()) == prefix.tokens
        assert prefixes.num_tokens == len({slot for prefix in kept for slot in prefix.slots.tolist()}) <= num_slots
    assert [prefix.tokens for prefix in kept] == sorted({prefix.tokens for prefix in kept})


@LAW
@given(st.lists(beginnings, max_size=8), beginnings, st.integers(0, 9))
def test_the_longest_beginning_is_found(kept: list[tuple[int, ...]], row: tuple[int, ...], limit: int) -> None:
    """A look-up finds as many common tokens as any kept beginning has, up to its limit, and none below the shortest."""
    prefixes = PrefixIndex(100, min_tokens=2)
    for tokens in kept:
        add(prefixes, tokens)

    prefix, depth = prefixes.longest(row, limit)

    most = min(max((common_prefix_length(tokens, row) for tokens in kept if len(tokens) >= 2), default=0), limit)
    assert depth == (most if most >= 2 else 0)
    assert (prefix is None) == (depth == 0)
    assert prefix is None or prefix.tokens[:depth] == row[:depth]


def test_beginnings_share_the_slots_of_what_they_begin_alike() -> None:
    """A second prompt behind the same system prompt takes slots for its own tokens alone, also when the first goes."""
    prefixes = PrefixIndex(10, min_tokens=2)
    first = add(prefixes, (1, 2, 3, 4))
    second = add(prefixes, (1, 2, 3, 9, 9))
    assert first is not None
    assert second is not None
    assert first.slots[:3].tolist() == second.slots[:3].tolist()
    assert prefixes.num_tokens == 6

    prefixes.remove(first)

    assert prefixes.num_tokens == 5
    assert prefixes.longest((1, 2, 3, 4), 4) == (second, 3)


def test_what_was_not_used_for_longest_makes_room() -> None:
    """A new prompt takes the place of the one that was used longest ago, and not of the one that was kept first."""
    prefixes = PrefixIndex(6, min_tokens=2)
    old, other = add(prefixes, (1, 1, 1)), add(prefixes, (2, 2, 2))
    assert old is not None
    prefixes.begin_pass()
    prefixes.use(old)

    new = add(prefixes, (3, 3, 3))

    assert other is not None
    assert [prefixes.longest(tokens, 3)[0] for tokens in ((1, 1, 1), (2, 2, 2), (3, 3, 3))] == [old, None, new]


def test_a_pass_never_loses_what_it_uses() -> None:
    """What finds no room beside the beginnings of its own pass is not kept."""
    prefixes = PrefixIndex(4, min_tokens=2)
    kept = add(prefixes, (1, 1, 1))
    assert kept is not None
    prefixes.begin_pass()
    prefixes.use(kept)

    assert prefixes.add((2, 2, 2)) is None
    assert prefixes.add((3,) * 5) is None
    assert prefixes.longest((1, 1, 1), 3) == (kept, 3)


def test_neighbouring_slots_are_taken_together() -> None:
    """What is kept one after the other stands in one run of slots, from the lowest on once all was forgotten."""
    prefixes = PrefixIndex(5000, min_tokens=2)
    first, second = add(prefixes, tuple(range(1500))), add(prefixes, tuple(range(1, 1400)))
    assert first is not None
    assert second is not None
    assert [*first.slots, *second.slots] == list(range(1500 + 1399))

    prefixes.clear()

    third = add(prefixes, (7, 8, 9))
    assert third is not None
    assert third.slots.tolist() == [0, 1, 2]
