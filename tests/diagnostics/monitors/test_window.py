"""Window statistics of a stream equal those of numpy over all its items, and skip unknown values."""

from __future__ import annotations

import numpy as np
import pytest
from observed_streams import ood, rewards_and_lengths, stream, style

from service.diagnostics.monitors.moments import WithinMoments, pearson
from service.diagnostics.monitors.observation import Observation, ObservedItems
from service.diagnostics.monitors.reference import intraclass_correlation
from service.diagnostics.monitors.window import EMPTY, Clusters, merge_windows, summarize
from service.records import Score

THRESHOLDS = np.zeros(5)


def test_buckets_merge_to_the_whole() -> None:
    """A window cut between prompts merges to the statistics of all its items, nothing counted twice."""
    seen = stream(60, 3, hacked=0.3)

    whole = summarize(ObservedItems.of(seen), THRESHOLDS)
    parts = [summarize(ObservedItems.of(seen[start : start + 30]), THRESHOLDS) for start in range(0, 180, 30)]
    merged = merge_windows([EMPTY, *parts])

    for name in (
        "clusters",
        "num_flagged",
        "style_exceedances",
        "num_styled",
        "num_groups_with_ood",
        "num_top1_ood",
        "num_pairs",
    ):
        assert getattr(merged, name) == getattr(whole, name), name
    for name in ("rewards", "lengths", "lengths_within", "styles", "styles_within", "surprises", "flagged_rewards"):
        assert getattr(merged, name).comoment == pytest.approx(getattr(whole, name).comoment, rel=1e-10), name
        assert getattr(merged, name).count == getattr(whole, name).count


def test_unknown_is_skipped_and_not_zero() -> None:
    """Items without length, style or p-value count for the reward alone; the correlation is that of the others."""
    known = stream(50)
    blind = [Observation(Score(100.0 + n), 1000 + n) for n in range(50)]

    found = summarize(ObservedItems.of(known + blind), THRESHOLDS)

    rewards, lengths = rewards_and_lengths(known)
    assert found.num_items == 150
    assert (found.rewards.count, found.lengths.count, found.styles.count, found.num_with_ood) == (150, 100, 100, 100)
    assert pearson(found.lengths.comoment) == pytest.approx(np.corrcoef(rewards, lengths)[0, 1], rel=1e-12)


def test_nothing_at_all() -> None:
    """No items, and items of which only the reward is known, make a window without values."""
    assert EMPTY.num_items == 0
    assert pearson(EMPTY.lengths.comoment) is None
    assert summarize(ObservedItems.of([Observation(Score(1.0), 0)]), None).num_styled == (0,) * 5


def test_flags_of_best_completions_are_counted() -> None:
    """A prompt counts when two or more of its completions have p-values, and by the flag of its best one."""
    flagged, fine = ood(0.005), ood(0.5)
    seen = [
        Observation(Score(2.0, ood=flagged), 1),
        Observation(Score(1.0, ood=fine), 1),
        Observation(Score(2.0, ood=fine), 2),
        Observation(Score(1.0, ood=flagged), 2),
        Observation(Score(9.0, ood=flagged), 3),
        Observation(Score(9.0), 4),
        Observation(Score(8.0, ood=flagged), 4),
    ]

    found = summarize(ObservedItems.of(seen), None)

    assert (found.num_groups_with_ood, found.num_top1_ood) == (2, 1)
    assert (found.num_with_ood, found.num_flagged) == (6, 4)


def test_ties_are_pairs_of_equal_rewards() -> None:
    """Of the pairs within prompts, those with the same reward are ties; equal rewards of two prompts are none."""
    rewards = {1: (1.0, 1.0, 1.0, 2.0), 2: (1.0, 2.0), 3: (1.0,)}
    seen = [Observation(Score(reward), prompt) for prompt, row in rewards.items() for reward in row]

    found = summarize(ObservedItems.of(seen), None)

    assert (found.num_pairs, found.num_tied_pairs) == (7, 3)


def test_style_exceedances_are_counted() -> None:
    """An item counts where its style markers per 100 words exceed the threshold."""
    seen = [
        Observation(Score(0.0, style=style(headers=1, list_items=1, emoji=1)), 1),
        Observation(Score(0.0, style=style(bold=1)), 2),
        Observation(Score(0.0, style=style(words=50, flattery=1)), 3),
        Observation(Score(0.0), 4),
    ]

    found = summarize(ObservedItems.of(seen), np.array([1.0, 0.0, 0.0, 1.0, 0.0]))

    assert (found.style_exceedances, found.num_styled) == ((1, 1, 0, 1, 0), (3, 3, 3, 3, 3))


def test_intraclass_correlation_and_design_effect() -> None:
    """Items that share half of their variance by prompt have an intraclass correlation of one half, and count less."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(4000), 4)
    values = (rng.normal(size=4000)[prompts] + rng.normal(size=16_000))[:, None]
    items = ObservedItems.of(
        [Observation(Score(float(value)), int(n)) for value, n in zip(values[:, 0], prompts, strict=True)]
    )
    found = summarize(items, None)

    intraclass = intraclass_correlation(found.rewards, WithinMoments.of(values, prompts), found.clusters)

    assert intraclass == pytest.approx(0.5, abs=0.03)
    assert found.clusters.design_effect(intraclass) == pytest.approx(1 + 3 * intraclass)
    assert Clusters.of(np.arange(10)).design_effect(0.9) == 1.0
