"""The texts of workloads are seeded and have the lengths of real data."""

from __future__ import annotations

import statistics

import pytest

from loadtest.workload import HH_COMPLETIONS, HH_PROMPTS, WORDS, LengthDistribution, cut_into_requests, draw_groups


def test_equal_seeds_give_equal_texts() -> None:
    """Work is reproducible, and another seed gives other work."""
    assert draw_groups(3, 4, seed=5) == draw_groups(3, 4, seed=5)
    assert draw_groups(3, 4, seed=5) != draw_groups(3, 4, seed=6)


@pytest.mark.parametrize(
    ("distribution", "median_words", "p95_words", "mean_words"),
    [(HH_PROMPTS, 73, 322, 107.2), (HH_COMPLETIONS, 38, 163, 54.3)],
    ids=["prompts", "completions"],
)
def test_lengths_are_those_of_real_preference_data(
    distribution: LengthDistribution, median_words: float, p95_words: float, mean_words: float
) -> None:
    """Median, 95th percentile and mean of the drawn lengths are those of HH-RLHF, at 1.3 tokens a word."""
    groups = draw_groups(20_000, 0, seed=1, prompts=distribution)
    lengths = sorted(len(group.prompt.split()) / 1.3 for group in groups)

    assert statistics.median(lengths) == pytest.approx(median_words, rel=0.05)
    assert lengths[int(0.95 * len(lengths))] == pytest.approx(p95_words, rel=0.08)
    assert statistics.fmean(lengths) == pytest.approx(mean_words, rel=0.08)
    assert max(lengths) * 1.3 <= distribution.longest


def test_completions_of_a_group_differ_in_length_and_share_the_prompt() -> None:
    """A group is like a rollout with several samples of one prompt."""
    (group,) = draw_groups(1, 8, seed=2)

    assert len({len(completion.split()) for completion in group.completions}) > 4
    assert {item["prompt"] for item in group.items} == {group.prompt}
    assert set(group.prompt.split()) <= set(WORDS)


def test_requests_have_every_item_once_in_order() -> None:
    """The requests together have the items of the groups, in order."""
    groups = draw_groups(3, 4, seed=3)

    requests = cut_into_requests(groups, items_per_request=5)

    assert [len(request) for request in requests] == [5, 5, 2]
    assert [item for group in groups for item in group.items] == [item for request in requests for item in request]


def test_shuffled_requests_have_every_item_once() -> None:
    """Shuffling is reproducible, and neither loses nor repeats an item."""
    groups = draw_groups(3, 4, seed=3)

    (ordered,), (shuffled,) = cut_into_requests(groups, 12), cut_into_requests(groups, 12, shuffle_seed=1)

    assert cut_into_requests(groups, 12, shuffle_seed=1) == [shuffled]
    assert shuffled != ordered
    assert sorted(map(str, shuffled)) == sorted(map(str, ordered))
