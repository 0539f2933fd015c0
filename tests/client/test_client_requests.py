"""Requests of the client: how calls are cut, how texts are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_client.requests import ChunkLimits, chunk_ranges, completion_text, exchange_items
from reward_client.retries import read_retry_after

A_DAY_OF_2026 = 1795392000.0


def chunks(sizes: list[int], groups: Sequence[object], max_items: int, max_bytes: int) -> list[tuple[int, int]]:
    limits = ChunkLimits(max_items, max_bytes)
    return [(places.start, places.stop) for places in chunk_ranges(sizes, groups, limits)]


def test_a_call_within_the_limits_is_one_request() -> None:
    """Nothing is cut without need."""
    assert chunks([5, 5, 5], ["a", "b", "c"], max_items=3, max_bytes=15) == [(0, 3)]


def test_groups_are_not_torn() -> None:
    """Completions of one prompt stay in one request, even where that leaves the request before it smaller."""
    assert chunks([1] * 6, ["a", "a", "b", "b", "b", "c"], max_items=4, max_bytes=99) == [(0, 2), (2, 6)]


def test_a_group_that_no_request_can_hold_is_cut() -> None:
    """A group above the limit is sent in full requests."""
    assert chunks([1] * 5, ["a"] * 5, max_items=2, max_bytes=99) == [(0, 2), (2, 4), (4, 5)]


def test_an_item_above_the_limit_stands_alone() -> None:
    """The service, which knows its own limit, judges it; its neighbours are not refused with it."""
    assert chunks([1, 50, 1], ["a", "b", "c"], max_items=9, max_bytes=10) == [(0, 1), (1, 2), (2, 3)]


@given(
    items=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=60),
    max_items=st.integers(1, 10),
    max_bytes=st.integers(1, 100),
)
def test_chunks_cover_every_item_once_in_order(items: list[tuple[int, int]], max_items: int, max_bytes: int) -> None:
    """Whatever the sizes: each item leaves once, in order, within the limits, and groups that fit stay whole."""
    sizes, groups = [size for size, _ in items], [group for _, group in items]

    cut = chunks(sizes, groups, max_items, max_bytes)

    assert [place for start, stop in cut for place in range(start, stop)] == list(range(len(items)))
    assert all(
        stop - start == 1 or (stop - start <= max_items and sum(sizes[start:stop]) <= max_bytes) for start, stop in cut
    )
    borders = {stop for _, stop in cut}
    for _, run in groupby(range(len(items)), key=lambda place: groups[place]):
        places = list(run)
        if len(places) <= max_items and sum(sizes[place] for place in places) <= max_bytes:
            assert not any(right in borders for _, right in pairwise(places))


def test_lists_of_different_lengths_are_refused() -> None:
    """A missing completion is the caller's error, before anything is sent."""
    with pytest.raises(ValueError, match="2 prompts, but 1 completions"):
        exchange_items(["a", "b"], ["c"])


@pytest.mark.parametrize(
    "completion",
    [
        [],
        [{"role": "user", "content": "x"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": "x"}] * 2,
    ],
    ids=["no-turn", "not-the-assistant", "no-text", "two-turns"],
)
def test_completion_must_be_one_text(completion: list[dict[str, str]]) -> None:
    """What has no single text is refused rather than guessed at."""
    with pytest.raises(ValueError, match="one assistant message"):
        completion_text(completion)


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
    """Seconds and dates are understood, the past is now, and nonsense says nothing."""
    assert seconds == read_retry_after(header, now=A_DAY_OF_2026)
