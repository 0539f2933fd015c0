"""The tree of shared beginnings: every token stands in the row once, and every sequence can be read back from it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.scheduling.prefix_tree import Branch, grow_branches, num_common, worth_sharing

LAW = settings(max_examples=200, deadline=None)

rows_of_two_letters = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12)


def row_of(rows: list[tuple[int, ...]], branches: list[Branch]) -> dict[int, int]:
    """Write the own tokens of every sequence into the row; no position may be written twice."""
    row: dict[int, int] = {}
    for ids, branch in zip(rows, branches, strict=True):
        for position, token in zip(range(*branch.own), ids[branch.num_shared :], strict=True):
            assert position not in row
            row[position] = token
    return row


@LAW
@given(rows_of_two_letters, st.sampled_from([None, 1, 2, 4]))
def test_every_sequence_can_be_read_back(rows: list[tuple[int, ...]], shortest: int | None) -> None:
    """The spans of a branch spell its sequence, whole and from any token on, and the row has no holes."""
    branches = grow_branches(rows, shortest)

    row = row_of(rows, branches)

    assert sorted(row) == list(range(len(row)))
    for ids, branch in zip(rows, branches, strict=True):
        assert tuple(row[position] for span in branch.spans for position in range(*span)) == ids
        assert branch.num_tokens == len(ids)
        assert tuple(row[branch.place(position)] for position in range(len(ids))) == ids
        for first in range(len(ids) + 1):
            spans = branch.spans_from(first)
            assert tuple(row[position] for span in spans for position in range(*span)) == ids[first:]


@LAW
@given(rows_of_two_letters)
def test_no_token_stands_in_the_row_twice(rows: list[tuple[int, ...]]) -> None:
    """With everything shared the row has one token for each different beginning: the nodes of the tree of ids."""
    branches = grow_branches(rows, 1)

    beginnings = {ids[:end] for ids in rows for end in range(1, len(ids) + 1)}
    assert sum(branch.num_own for branch in branches) == len(beginnings)


@LAW
@given(rows_of_two_letters, st.integers(1, 6))
def test_short_beginnings_are_not_shared(rows: list[tuple[int, ...]], shortest: int) -> None:
    """A sequence shares nothing, or at least as many tokens as are worth it, and those with another sequence."""
    for ids, branch in zip(rows, grow_branches(rows, shortest), strict=True):
        if branch.num_shared:
            assert branch.num_shared >= shortest
            assert sum(other[: branch.num_shared] == ids[: branch.num_shared] for other in rows) > 1


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
        best = max(kept, key=lambda beginning, row=row: num_common(beginning, row))
        most = min(num_common(best, row), data.draw(st.integers(0, len(row))))
        depths.append(worth_sharing(most, shortest))
        spans.append((len(behind), len(behind) + depths[-1]))
        behind += best

    branches = grow_branches(rows, shortest, spans)

    written = row_of(rows, branches)
    assert sorted(written) == list(range(len(written)))
    for ids, branch, depth in zip(rows, branches, depths, strict=True):
        read = [position for span in branch.spans for position in range(*span)]
        tokens = [written[place] if place < len(written) else behind[place - len(written)] for place in read]
        assert tuple(tokens) == ids
        assert all(place < len(written) for place in read[depth:])
    if shortest == 1:
        computed = {ids[: n + 1] for ids, depth in zip(rows, depths, strict=True) for n in range(depth, len(ids))}
        assert len(written) == len(computed)


def test_without_sharing_sequences_stand_in_their_order() -> None:
    """Equal sequences then have tokens of their own each."""
    branches = grow_branches([(2, 2), (1,), (2, 2)], None)

    assert [branch.own for branch in branches] == [(0, 2), (2, 3), (3, 5)]
    assert not any(branch.num_shared for branch in branches)


def test_nested_beginnings() -> None:
    """System prompt, prompts, completions: each level stands in the row once."""
    system, first, second = (1,) * 5, (2,) * 4, (3,) * 4
    rows = [system + first + (7,), system + second + (7,), system + first + (8, 8), system + first]

    branches = grow_branches(rows, 1)

    assert [branch.num_shared for branch in branches] == [9, 5, 9, 0]
    assert sum(branch.num_own for branch in branches) == 5 + 4 + 1 + 4 + 1 + 2


def test_a_position_beyond_the_end_is_an_error() -> None:
    """Nobody reads a neighbour's token."""
    (branch,) = grow_branches([(1, 2)], 1)

    with pytest.raises(IndexError):
        branch.place(2)


@LAW
@given(st.lists(st.integers(0, 1), max_size=20), st.lists(st.integers(0, 1), max_size=20))
def test_common_tokens_are_counted(first: list[int], second: list[int]) -> None:
    """The number of leading tokens that are equal, found by halving."""
    expected = 0
    while expected < min(len(first), len(second)) and first[expected] == second[expected]:
        expected += 1

    assert num_common(tuple(first), tuple(second)) == expected
