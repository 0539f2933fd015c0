"""Requests of the client: calls are split into requests, and completions and headers are parsed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_client.requests import ChunkLimits, chunk_ranges, completion_content, exchange_items
from reward_client.retries import read_retry_after

NOW = 1795392000.0


def chunks(sizes: list[int], groups: Sequence[object], max_items: int, max_bytes: int) -> list[tuple[int, int]]:
    limits = ChunkLimits(max_items, max_bytes)
    return [(part.start, part.stop) for part in chunk_ranges(sizes, groups, limits)]


def test_a_call_within_the_limits_is_one_request() -> None:
    """It is not split."""
    assert chunks([5, 5, 5], ["a", "b", "c"], max_items=3, max_bytes=15) == [(0, 3)]


def test_groups_are_not_split() -> None:
    """Completions of one prompt stay in one request, even if the previous request is then smaller."""
    assert chunks([1] * 6, ["a", "a", "b", "b", "b", "c"], max_items=4, max_bytes=99) == [(0, 2), (2, 6)]


def test_a_group_above_the_limit_is_split() -> None:
    """A group that no request can hold is split into full requests."""
    assert chunks([1] * 5, ["a"] * 5, max_items=2, max_bytes=99) == [(0, 2), (2, 4), (4, 5)]


def test_an_item_above_the_limit_is_sent_alone() -> None:
    """The service may refuse it by its own limit, and no other item is refused with it."""
    assert chunks([1, 50, 1], ["a", "b", "c"], max_items=9, max_bytes=10) == [(0, 1), (1, 2), (2, 3)]


@given(
    items=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=60),
    max_items=st.integers(1, 10),
    max_bytes=st.integers(1, 100),
)
def test_chunks_cover_every_item_once_in_order(items: list[tuple[int, int]], max_items: int, max_bytes: int) -> None:
    """For any sizes each item is sent once, in order, within the limits, and groups that fit are not split."""
    sizes, groups = [size for size, _ in items], [group for _, group in items]

    parts = chunks(sizes, groups, max_items, max_bytes)

    assert [index for start, stop in parts for index in range(start, stop)] == list(range(len(items)))
    assert all(
        stop - start == 1 or (stop - start <= max_items and sum(sizes[start:stop]) <= max_bytes)
        for start, stop in parts
    )
    ends = {stop for _, stop in parts}
    for _, run in groupby(range(len(items)), key=lambda index: groups[index]):
        indices = list(run)
        if len(indices) <= max_items and sum(sizes[index] for index in indices) <= max_bytes:
            assert not any(right in ends for _, right in pairwise(indices))


def test_lists_of_different_lengths_are_refused() -> None:
    """A missing completion is the caller's error, before anything is sent."""
    with pytest.raises(ValueError, match="2 prompts, but 1 completions"):
        exchange_items(["a", "b"], ["c"])


def test_a_completion_of_messages_keeps_its_turns() -> None:
    """One assistant message of text is sent as its text; other turns are sent as they are, without absent fields."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "4", "name": None}

    assert completion_content([{"role": "assistant", "content": "x", "name": None}]) == "x"
    assert completion_content([call, result]) == [
        {"role": "assistant", "tool_calls": call["tool_calls"]},
        {"role": "tool", "content": "4"},
    ]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("-4", 0.0),
        ("nan", None),
        ("soon", None),
        ("Mon, 23 Nov 2026 00:00:07 GMT", 7.0),
        ("Sun, 22 Nov 2026 00:00:00 GMT", 0.0),
    ],
)
def test_retry_after_is_read_in_both_forms(header: str | None, seconds: float | None) -> None:
    """Seconds and dates are parsed, the past is zero, and an invalid value is None."""
    assert seconds == read_retry_after(header, now=NOW)
