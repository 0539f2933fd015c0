"""How a large request is divided among replicas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.records import Exchange, Item, TokenSequence
from service.scheduling.scatter import ReplicaLoad, ShardPlan, num_tokens, own_tokens, plan_shards, select
from service.scheduling.work import Work, plan_work


def work_of(*group_sizes: int, prompt_tokens: int = 20, completion_tokens: int = 80) -> Work:
    """Work of groups of so many completions, each group with a prompt of its own."""
    items, encoded = [], []
    for group, size in enumerate(group_sizes):
        for number in range(size):
            items.append(Item(Exchange(f"{group}", f"{number}")))
            ids = (group,) * prompt_tokens + (number,) * completion_tokens
            encoded.append(TokenSequence(ids, num_prompt_tokens=prompt_tokens))
    return plan_work(items, encoded)


def idle(*names: str) -> list[ReplicaLoad]:
    return [ReplicaLoad(name, 0) for name in names]


def plan(work: Work, siblings: list[ReplicaLoad], *, own: int = 0, min_tokens: int = 100) -> ShardPlan:
    return plan_shards(work, ReplicaLoad("", own), siblings, min_tokens=min_tokens, shares_prefixes=True)


def tokens(work: Work, indices: tuple[int, ...]) -> int:
    return num_tokens(select(work, indices))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.lists(st.integers(0, 20_000), max_size=6),
    st.integers(0, 20_000),
    st.integers(1, 4000),
)
def test_every_sequence_is_in_one_shard(
    group_sizes: list[int], sibling_loads: list[int], own: int, min_tokens: int
) -> None:
    """Whatever the loads, each sequence is computed exactly once, by a replica that exists."""
    work = work_of(*group_sizes)
    siblings = [ReplicaLoad(f"r{number}", load) for number, load in enumerate(sibling_loads)]

    shards = plan(work, siblings, own=own, min_tokens=min_tokens)

    assert sorted(index for indices in shards.values() for index in indices) == list(range(sum(group_sizes)))
    assert shards.keys() <= {"", *(sibling.name for sibling in siblings)}
    assert len(shards) <= max(1, num_tokens(work) // min_tokens)


def test_groups_stay_whole_and_shards_are_equal() -> None:
    """128 groups of eight on four replicas: no group is divided, and shards are equal within 2 percent."""
    work = work_of(*[8] * 128)

    shards = plan(work, idle("a", "b", "c"))

    places = {
        prefix: {name for name, indices in shards.items() for i in indices if work.prefixes[i] == prefix}
        for prefix in set(work.prefixes)
    }
    assert all(len(names) == 1 for names in places.values())
    assert max(tokens(work, indices) for indices in shards.values()) <= 1.02 * num_tokens(work) / 4


def test_one_group_of_many_completions_is_cut() -> None:
    """A single group is more than a fair share, so every replica gets a piece of it."""
    work = work_of(1024)

    shards = plan(work, idle("a", "b", "c"))

    assert {name: len(indices) for name, indices in shards.items()} == {"": 256, "a": 256, "b": 256, "c": 256}


def test_waiting_tokens_count() -> None:
    """A replica whose queue is longer than the request gets nothing of it."""
    work = work_of(*[8] * 16)

    shards = plan(work, [ReplicaLoad("busy", 10**6), ReplicaLoad("free", 0)])

    assert shards.keys() == {"", "free"}


def test_a_small_request_stays() -> None:
    """Fewer tokens than two shards need: the replica that received the request computes all of it."""
    work = work_of(8)

    assert plan(work, idle("a", "b"), min_tokens=num_tokens(work)) == {"": tuple(range(8))}


@pytest.mark.parametrize(
    ("num_tokens", "own", "siblings", "expected"),
    [
        (9000, 0, [], 9000),
        (9000, 0, [0, 0], 3000),
        (9000, 6000, [0, 0], 0),  # the others finish it after 4,500
        (9000, 3000, [0, 0], 1000),
        (9000, 0, [50_000, 0], 4500),
        (1999, 0, [0, 0], 1999),  # one shard only
        (2000, 0, [500, 100, 300], 1050),  # two shards: the sibling with the least work
    ],
)
def test_own_tokens(num_tokens: int, own: int, siblings: list[int], expected: int) -> None:
    """The estimated own part makes all replicas that take part finish at the same time."""
    assert own_tokens(num_tokens, own, siblings, min_tokens=1000) == expected


@given(st.integers(1, 20), st.lists(st.integers(0, 8000), max_size=6), st.integers(0, 8000))
def test_own_tokens_are_those_of_the_plan(num_groups: int, loads: list[int], own: int) -> None:
    """The estimate differs from the plan for equal groups of one by at most the largest group."""
    work = work_of(*[1] * num_groups)
    siblings = [ReplicaLoad(str(number), load) for number, load in enumerate(loads)]
    planned = tokens(work, plan(work, siblings, own=own).get("", ()))

    assert abs(own_tokens(num_tokens(work), own, loads, min_tokens=100) - planned) <= 100
