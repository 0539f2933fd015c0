"""Prefix sharing: a packed batch holds every token once, and every sequence can be read back from it."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.prefix_tree import (
    SequenceLayout,
    common_prefix_length,
    has_shared_prefix,
    plan_prefix_sharing,
    shareable_tokens,
)

LAW = settings(max_examples=200, deadline=None)

batches_of_two_tokens = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12
)


def packed_tokens(sequences: list[tuple[int, ...]], layouts: list[SequenceLayout]) -> dict[int, int]:
    """Write the own tokens of every sequence into the packed batch; no index may be written twice."""
    packed: dict[int, int] = {}
    for ids, layout in zip(sequences, layouts, strict=True):
        for position, token in zip(range(*layout.own), ids[layout.num_shared :], strict=True):
            assert position not in packed
            packed[position] = token
    return packed


@LAW
@given(batches_of_two_tokens, st.sampled_from([None, 1, 2, 4]))
def test_every_sequence_can_be_read_back(sequences: list[tuple[int, ...]], shortest: int | None) -> None:
    """The spans of a layout hold its sequence, whole and from any token on, and the packed batch has no gaps."""
    layouts = plan_prefix_sharing(sequences, shortest)

    packed = packed_tokens(sequences, layouts)

    assert sorted(packed) == list(range(len(packed)))
    for ids, layout in zip(sequences, layouts, strict=True):
        assert tuple(packed[position] for span in layout.spans for position in range(*span)) == ids
        assert layout.num_tokens == len(ids)
        assert tuple(packed[layout.index_of(position)] for position in range(len(ids))) == ids
        for first in range(len(ids) + 1):
            spans = layout.spans_from(first)
            assert tuple(packed[position] for span in spans for position in range(*span)) == ids[first:]


@LAW
@given(batches_of_two_tokens)
def test_no_token_is_computed_twice(sequences: list[tuple[int, ...]]) -> None:
    """With everything shared the batch has one token for each distinct prefix: the nodes of an uncompressed trie."""
    layouts = plan_prefix_sharing(sequences, 1)

    prefixes = {ids[:end] for ids in sequences for end in range(1, len(ids) + 1)}
    assert sum(layout.num_own for layout in layouts) == len(prefixes)


@LAW
@given(batches_of_two_tokens, st.integers(1, 6))
def test_short_prefixes_are_not_shared(sequences: list[tuple[int, ...]], shortest: int) -> None:
    """A sequence shares nothing, or at least the minimum of tokens, and those with another sequence."""
    for ids, layout in zip(sequences, plan_prefix_sharing(sequences, shortest), strict=True):
        if layout.num_shared:
            assert layout.num_shared >= shortest
            assert sum(other[: layout.num_shared] == ids[: layout.num_shared] for other in sequences) > 1


@LAW
@given(batches_of_two_tokens, batches_of_two_tokens, st.sampled_from([1, 2, 4]), st.data())
def test_cached_prefixes_follow_the_packed_batch(
    sequences: list[tuple[int, ...]], cached: list[tuple[int, ...]], shortest: int, data: st.DataObject
) -> None:
    """With cached tokens every sequence can be read back, and no token that it must compute is taken from the cache.

    A token that some sequence must compute is in the batch once, for all sequences with that prefix.
    """
    counts: list[int] = []
    spans: list[tuple[int, int]] = []
    cached_tokens: list[int] = []
    for ids in sequences:
        best = max(cached, key=partial(common_prefix_length, ids))
        most = min(common_prefix_length(best, ids), data.draw(st.integers(0, len(ids))))
        counts.append(shareable_tokens(most, shortest))
        spans.append((len(cached_tokens), len(cached_tokens) + counts[-1]))
        cached_tokens += best

    layouts = plan_prefix_sharing(sequences, shortest, spans)

    written = packed_tokens(sequences, layouts)
    assert sorted(written) == list(range(len(written)))
    for ids, layout, count in zip(sequences, layouts, counts, strict=True):
        read = [position for span in layout.spans for position in range(*span)]
        tokens = [written[index] if index < len(written) else cached_tokens[index - len(written)] for index in read]
        assert tuple(tokens) == ids
        assert all(index < len(written) for index in read[count:])
    if shortest == 1:
        computed = {ids[: n + 1] for ids, count in zip(sequences, counts, strict=True) for n in range(count, len(ids))}
        assert len(written) == len(computed)


def test_without_sharing_sequences_keep_their_order() -> None:
    """Equal sequences then have their own tokens each."""
    layouts = plan_prefix_sharing([(2, 2), (1,), (2, 2)], None)

    assert [layout.own for layout in layouts] == [(0, 2), (2, 3), (3, 5)]
    assert not any(layout.num_shared for layout in layouts)


def test_nested_prefixes() -> None:
    """System prompt, prompts, completions: each level is in the batch once."""
    system, first, second = (1,) * 5, (2,) * 4, (3,) * 4
    sequences = [system + first + (7,), system + second + (7,), system + first + (8, 8), system + first]

    layouts = plan_prefix_sharing(sequences, 1)

    assert [layout.num_shared for layout in layouts] == [9, 5, 9, 0]
    assert sum(layout.num_own for layout in layouts) == 5 + 4 + 1 + 4 + 1 + 2


def test_a_position_beyond_the_end_is_an_error() -> None:
    """No index of another sequence's token is returned."""
    (layout,) = plan_prefix_sharing([(1, 2)], 1)

    with pytest.raises(IndexError):
        layout.index_of(2)


@LAW
@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_tokens_are_counted(first: list[int], second: list[int]) -> None:
    """The number of leading tokens that are equal, found by bisection, is the one found by comparing one by one."""
    expected = 0
    while expected < min(len(first), len(second)) and first[expected] == second[expected]:
        expected += 1

    assert common_prefix_length(tuple(first), tuple(second)) == expected


@LAW
@given(batches_of_two_tokens, st.sampled_from([None, 1, 2, 4]))
def test_a_shared_prefix_is_detected_without_the_tree(sequences: list[tuple[int, ...]], shortest: int | None) -> None:
    """``has_shared_prefix`` is true exactly where the tree of the same sequences shares tokens."""
    layouts = plan_prefix_sharing(sequences, shortest)

    assert has_shared_prefix(sequences, shortest) == any(layout.num_shared for layout in layouts)
