"""The tree of shared beginnings: every token stands in the row once, and every sequence can be read back from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.prefix_tree import SequenceLayout, common_prefix_length, plan_prefix_sharing, shareable_tokens

LAW = settings(max_examples=200, deadline=None)

rows_of_two_letters = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12)


def row_of(rows: list[tuple[int, ...]], layouts: list[SequenceLayout]) -> dict[int, int]:
    """Write the own tokens of every sequence into the row; no position may be written twice."""
    row: dict[int, int] = {}
    for ids, layout in zip(rows, layouts, strict=True):
        for position, token in zip(range(*layout.own), ids[layout.num_shared :], strict=True):
            assert position not in row
            row[position] = token
    return row


@LAW
@given(rows_of_two_letters, st.sampled_from([None, 1, 2, 4]))
def test_every_sequence_can_be_read_back(rows: list[tuple[int, ...]], shortest: int | None) -> None:
    """The spans of a layout spell its sequence, whole and from any token on, and the row has no holes."""
    layouts = plan_prefix_sharing(rows, shortest)

    row = row_of(rows, layouts)

    assert sorted(row) == list(range(len(row)))
    for ids, layout in zip(rows, layouts, strict=True):
        assert tuple(row[position] for span in layout.spans for position in range(*span)) == ids
        assert layout.num_tokens == len(ids)
        assert tuple(row[layout.index_of(position)] for position in range(len(ids))) == ids
        for first in range(len(ids) + 1):
            spans = layout.spans_from(first)
            assert tuple(row[position] for span in spans for position in range(*span)) == ids[first:]


@LAW
@given(rows_of_two_letters)
def test_no_token_stands_in_the_row_twice(rows: list[tuple[int, ...]]) -> None:
    """With everything shared the row has one token for each different beginning: the nodes of the tree of ids."""
    layouts = plan_prefix_sharing(rows, 1)

    beginnings = {ids[:end] for ids in rows for end in range(1, len(ids) + 1)}
    assert sum(layout.num_own for layout in layouts) == len(beginnings)


@LAW
@given(rows_of_two_letters, st.integers(1, 6))
def test_short_beginnings_are_not_shared(rows: list[tuple[int, ...]], shortest: int) -> None:
    """A sequence shares nothing, or at least as many tokens as are worth it, and those with another sequence."""
    for ids, layout in zip(rows, plan_prefix_sharing(rows, shortest), strict=True):
        if layout.num_shared:
            assert layout.num_shared >= shortest
            assert sum(other[: layout.num_shared] == ids[: layout.num_shared] for other in rows) > 1


@LAW
@given(rows_of_two_letters, rows_of_two_letters, st.sampled_from([1, 2, 4]), st.data())
def test_kept_beginnings_stand_behind_the_row(
    rows: list[tuple[int, ...]], kept: list[tuple[int, ...]], shortest: int, data: st.DataObject
) -> None:
    """With kept tokens behind the row every sequence can be read, and it leaves out no token that it must compute.

    What somebody must compute stands in the row once, for all who begin like him.
    """
    depths: list[int] = []
    spans: list[tuple[int, int]] = []
    behind: list[int] = []
    for row in rows:
        best = max(kept, key=lambda beginning, row=row: common_prefix_length(beginning, row))
        most = min(common_prefix_length(best, row), data.draw(st.integers(0, len(row))))
        depths.append(shareable_tokens(most, shortest))
        spans.append((len(behind), len(behind) + depths[-1]))
        behind += best

    layouts = plan_prefix_sharing(rows, shortest, spans)

    written = row_of(rows, layouts)
    assert sorted(written) == list(range(len(written)))
    for ids, layout, depth in zip(rows, layouts, depths, strict=True):
        read = [position for span in layout.spans for position in range(*span)]
        tokens = [written[place] if place < len(written) else behind[place - len(written)] for place in read]
        assert tuple(tokens) == ids
        assert all(place < len(written) for place in read[depth:])
    if shortest == 1:
        computed = {ids[: n + 1] for ids, depth in zip(rows, depths, strict=True) for n in range(depth, len(ids))}
        assert len(written) == len(computed)


def test_without_sharing_sequences_stand_in_their_order() -> None:
    """Equal sequences then have tokens of their own each."""
    layouts = plan_prefix_sharing([(2, 2), (1,), (2, 2)], None)

    assert [layout.own for layout in layouts] == [(0, 2), (2, 3), (3, 5)]
    assert not any(layout.num_shared for layout in layouts)


def test_nested_beginnings() -> None:
    """System prompt, prompts, completions: each level stands in the row once."""
    system, first, second = (1,) * 5, (2,) * 4, (3,) * 4
    rows = [system + first + (7,), system + second + (7,), system + first + (8, 8), system + first]

    layouts = plan_prefix_sharing(rows, 1)

    assert [layout.num_shared for layout in layouts] == [9, 5, 9, 0]
    assert sum(layout.num_own for layout in layouts) == 5 + 4 + 1 + 4 + 1 + 2


def test_a_position_beyond_the_end_is_an_error() -> None:
    """Nobody reads a neighbour's token."""
    (layout,) = plan_prefix_sharing([(1, 2)], 1)

    with pytest.raises(IndexError):
        layout.index_of(2)


@LAW
@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_tokens_are_counted(first: list[int], second: list[int]) -> None:
    """The number of leading tokens that are equal, found by halving."""
    expected = 0
    while expected < min(len(first), len(second)) and first[expected] == second[expected]:
        expected += 1

    assert common_prefix_length(tuple(first), tuple(second)) == expected
