"""Load shapes assign every item to a request, and no text is sent twice."""

from __future__ import annotations

import pytest

from loadtest.load_shapes import LoadShape, passes, shapes_against_plain, shapes_of_prefixes

ALL_SHAPES = {shape.name: shape for shape in [*shapes_against_plain(2, 3), *shapes_of_prefixes(2, 3)]}


@pytest.mark.parametrize(
    ("name", "num_requests", "num_items", "num_connections", "num_prompts"),
    [
        ("single", 16, 16, 32, 2),
        ("single shuffled", 16, 16, 32, 2),
        ("bulk", 1, 24, 1, 3),
        ("bulk shuffled", 1, 24, 1, 3),
        ("independent single", 16, 16, 32, 16),
        ("independent bulk", 1, 24, 1, 24),
    ],
)
def test_each_shape_sends_what_its_name_says(
    name: str, num_requests: int, num_items: int, num_connections: int, num_prompts: int
) -> None:
    """The numbers of requests, items, connections and prompts, for two groups sent singly or three in bulk."""
    shape = ALL_SHAPES[name]

    requests = shape.requests(seed=1)

    items = [item for request in requests for item in request]
    assert (len(requests), len(items), shape.num_connections) == (num_requests, num_items, num_connections)
    assert len({item["prompt"] for item in items}) == num_prompts
    prompts = [item["prompt"] for item in items]
    in_order = prompts == sorted(prompts, key=prompts.index)
    assert in_order is not shape.is_shuffled


def test_no_pass_repeats_a_prompt_of_another() -> None:
    """No cache can help between passes, whatever the shape and round, and after the warm-up."""
    shapes = shapes_of_prefixes(4, 4)

    planned = [*passes(shapes, rounds=3, seed=1), *passes(shapes, rounds=1, seed=0)]

    seen = [{item["prompt"] for item in one.items if len(item["prompt"].split()) > 8} for one in planned]
    assert len(seen) == 4 * len(shapes)
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_passes_are_ordered_by_round() -> None:
    """All shapes of a round precede the next round, so that a ratio compares figures close in time."""
    shapes = shapes_against_plain(1, 1)

    assert [(one.round, one.shape.name) for one in passes(shapes, rounds=2, seed=1)] == [
        (round_, shape.name) for round_ in range(2) for shape in shapes
    ]


def test_the_title_describes_how_the_work_is_sent() -> None:
    """A row of the table can be understood alone."""
    assert [shape.title for shape in shapes_of_prefixes(16, 16)] == [
        "16 groups of 8, shuffled: singly, 32 connections",
        "16 groups of 8: 1 request",
        "128 independent: singly, 32 connections",
        "128 independent: 1 request",
    ]
    assert LoadShape("any", num_groups=2, items_per_request=4, num_connections=3).title.endswith("3 connections")
