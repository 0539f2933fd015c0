"""Prometheus counters from which PromQL computes the correlation over any number of replicas exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from observed_streams import ood, reference, rewards_and_lengths, stream, style
from prometheus_client.parser import text_string_to_metric_families

from service.diagnostics.monitors.monitor import Monitors
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.monitors.publisher import Publisher
from service.diagnostics.monitors.reference import MonitorReference
from service.metrics import Metrics, merge_expositions
from service.records import Score
from service.settings import MonitorSettings

SETTINGS = MonitorSettings(window_items=512, batch_items=64)


class Replica:
    """Metrics and monitors of one replica, as the service joins them."""

    def __init__(self, known: MonitorReference | None = None) -> None:
        self.metrics = Metrics()
        publisher = Publisher(self.metrics, known, SETTINGS)
        self.monitors = Monitors(SETTINGS, known, publisher.count)
        publisher.watch(self.monitors)

    def fed(self, seen: list[Observation]) -> Replica:
        for begin in range(0, len(seen), 10):
            self.monitors.observe(seen[begin : begin + 10])
        return self


def samples(*replicas: Replica) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """The samples of one scrape of all replicas, summed over them as by ``sum by``."""
    text = merge_expositions({f"r{n}": each.metrics.render() for n, each in enumerate(replicas)}, incomplete=False)
    total: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = frozenset((name, value) for name, value in sample.labels.items() if name != "replica")
            total[sample.name, labels] = total.get((sample.name, labels), 0.0) + sample.value
    return total


def correlation(found: dict[tuple[str, frozenset[tuple[str, str]]], float], scope: str) -> float:
    """The recording rule's arithmetic (polarisation), on sums of counters."""

    def moment(stat: str) -> float:
        return found["rm_moment_total", frozenset({("stat", stat), ("scope", scope)})]

    n = moment("n")
    sum_r, sum_l = moment("zr_pos") - moment("zr_neg"), moment("zl_pos") - moment("zl_neg")
    product = (moment("sum2") - moment("diff2")) / 4 - sum_r * sum_l / n
    return product / math.sqrt((moment("zr2") - sum_r**2 / n) * (moment("zl2") - sum_l**2 / n))


@pytest.mark.parametrize("calibrated", [True, False])
def test_correlation_of_three_replicas_from_counters(calibrated: bool) -> None:
    """The correlation that PromQL computes from the counters of three replicas is numpy's over all items, to 1e-9."""
    known = reference(500) if calibrated else None
    shares = [stream(300 * (n + 1), seed=30 + n, slope=0.5 * n, first_prompt=10_000 * n) for n in range(3)]
    replicas = [Replica(known).fed(seen) for seen in shares]

    found = samples(*replicas)

    seen = [item for share in shares for item in share]
    rewards, lengths = rewards_and_lengths(seen)
    prompts = np.array([item.prompt for item in seen])
    members = np.unique(prompts, return_inverse=True)[1]
    sizes = np.bincount(members)
    reward_deviations, length_deviations = (
        column - (np.bincount(members, column) / sizes)[members] for column in (rewards, lengths)
    )
    assert correlation(found, "pooled") == pytest.approx(np.corrcoef(rewards, lengths)[0, 1], abs=1e-9)
    within = np.corrcoef(reward_deviations, length_deviations)[0, 1]
    assert correlation(found, "within") == pytest.approx(within, abs=1e-9)
    assert found["rm_moment_total", frozenset({("stat", "groups"), ("scope", "within")})] == 1800


def test_all_series_start_at_zero() -> None:
    """Every series of bounded labels exists before the first item, so that increase() misses nothing."""
    found = samples(Replica())

    counters = [key for key in found if key[0] in {"rm_moment_total", "rm_style_total", "rm_ood_flag_total"}]
    assert len(counters) == 20 + 6 + 38
    assert {found[key] for key in counters} == {0.0}
    assert math.isnan(found["rm_reward_length_corr", frozenset({("scope", "pooled")})])
    assert not any(name.startswith("rm_calibration") for name, _ in found)


def test_every_item_is_counted_once() -> None:
    """Styles, words, p-values, flags, groups and ties are counted once an item, also those of an unfinished batch."""
    seen = [
        Observation(Score(1.0, reward_z=0.5, style=style(list_items=2, emoji=1), ood=ood(0.002)), 1, 10),
        Observation(Score(0.5, reward_z=0.1, style=style(bold=3, words=7), ood=ood(0.4)), 1, 12),
        Observation(Score(0.5), 1),
    ]
    replica = Replica().fed(seen)

    found = samples(replica)
    again = samples(replica)

    def counted(name: str, **labels: str) -> float:
        assert found[name, frozenset(labels.items())] == again[name, frozenset(labels.items())]
        return found[name, frozenset(labels.items())]

    assert counted("rm_style_total", kind="list_items") == 2
    assert counted("rm_style_total", kind="emoji") == 1
    assert counted("rm_words_total") == 107
    assert counted("rm_ood_pvalue_count") == 2
    assert counted("rm_ood_pvalue_bucket", le="0.005") == 1
    assert counted("rm_ood_flag_total", reason="text:rep4+") == 1
    assert counted("rm_ood_neglogp_total") == pytest.approx(-math.log(0.002) - math.log(0.4))
    assert counted("rm_reward_z_count") == 2
    assert (counted("rm_groups_total"), counted("rm_top1_ood_total")) == (1, 1)
    assert (counted("rm_pairs_total"), counted("rm_tied_pairs_total")) == (3, 1)
    assert counted("rm_moment_total", stat="n", scope="pooled") == 2
    assert counted("rm_tie_rate") == pytest.approx(1 / 3)


def test_gauges_show_the_window_and_its_alarms() -> None:
    """Gauges are the window's readings; an alarm is 1 while it lasts and is counted when it begins."""
    known = reference(1000)
    replica = Replica(known).fed(stream(600, seed=40, hacked=0.3, slope=4.0))

    found = samples(replica)

    state = replica.monitors.state()
    assert state is not None
    assert found["rm_reward_length_corr", frozenset({("scope", "within")})] > 0.8
    assert found["rm_reward_length_corr_ci_low", frozenset({("scope", "within")})] > 0.7
    assert found["rm_group_centered_n", frozenset()] == state.statistics.num_items
    assert found["rm_style_r2_within", frozenset()] > 0.6
    assert found["rm_alarm", frozenset({("signal", "reward_length_r2_within"), ("severity", "critical")})] == 1
    assert found["rm_alarm", frozenset({("signal", "cusum_surprise"), ("severity", "warn")})] == 1
    assert found["rm_alarms_total", frozenset({("signal", "surprise")})] == 1
    assert (
        found["rm_cusum", frozenset({("signal", "surprise"), ("direction", "up")})]
        > found["rm_cusum_threshold", frozenset()]
    )
