"""The metrics have the names and buckets that dashboards use, and merging replicas preserves every value."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import OUTCOMES, REWARDS, SECONDS, Metrics, merge_expositions
from service.records import ModelIdentity

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: str | bytes) -> Samples:
    families = text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def used_metrics(seed: int) -> Metrics:
    metrics = Metrics()
    metrics.describe_model(ModelIdentity('a "quoted\\name"', "v1"), sha256="ab" * 32, dtype="float32", device="cpu")
    metrics.describe_build("0.1.0", "unknown")
    metrics.describe_calibration("sha256:ab", n_cal=1000, n_prompts=500, created_s=1.7e9)
    metrics.observe_request("/v1/score", "200", 0.1 * seed)
    metrics.items.labels(outcome="ok").inc(10**15 + seed)
    for reward in (-20.0, -0.25, seed / 3):
        metrics.reward.observe(reward)
    metrics.queue_oldest.set(1 / (3 + seed))
    return metrics


def test_names_follow_the_rules() -> None:
    """Every name has the prefix, no colon and a base unit, and every metric has a help text."""
    families = list(text_string_to_metric_families(Metrics().render().decode()))

    assert families
    for family in families:
        assert re.fullmatch(r"rm_[a-z0-9_]+", family.name)
        assert family.documentation
        assert not re.search(r"_(ms|millis\w*|micros\w*|count|sum|bucket)$", family.name)


def test_buckets_are_in_human_units() -> None:
    """Latency buckets: 1 ms to 32.768 s by factors of two; rewards: -16 to 16 in steps of 1, and +-0.5."""
    assert (SECONDS[0], SECONDS[-1], len(SECONDS)) == (0.001, 32.768, 16)
    assert all(high == pytest.approx(2 * low) for low, high in pairwise(SECONDS))
    assert (REWARDS[0], REWARDS[-1], len(REWARDS)) == (-16, 16, 35)
    assert {-0.5, 0, 0.5} <= set(REWARDS)


def test_replicas_do_not_share_a_registry() -> None:
    """Two replicas in one process have separate counters."""
    first, second = Metrics(), Metrics()
    first.oom.inc()

    assert samples(first.render())["rm_oom_total", frozenset()] == 1
    assert samples(second.render())["rm_oom_total", frozenset()] == 0


def test_merging_keeps_every_value_exactly() -> None:
    """Counters, histograms, infos and creation times of all replicas are preserved exactly, labelled by replica."""
    texts = {name: used_metrics(seed).render() for seed, name in enumerate(("replica-a", "replica-b", "replica-c"), 1)}

    merged = samples(merge_expositions(texts, incomplete=False))

    expected = {
        (name, labels | {("replica", replica)}): value
        for replica, text in texts.items()
        for (name, labels), value in samples(text).items()
    }
    expected |= {("rm_metrics_scrape_incomplete", frozenset()): 0.0}
    assert {key: repr(value) for key, value in merged.items()} == {key: repr(value) for key, value in expected.items()}
    assert any(name.endswith("_created") for name, _ in merged)
    assert any(name.endswith("_bucket") for name, _ in merged)


def test_merging_declares_each_family_once() -> None:
    """HELP and TYPE are written once per family, with the type that the replicas declared."""
    text = used_metrics(1).render().decode()

    merged = merge_expositions({"a": text, "b": text}, incomplete=False)

    declared = [line for line in merged.splitlines() if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))
    assert set(declared) - {"# TYPE rm_metrics_scrape_incomplete gauge"} == {
        line for line in text.splitlines() if line.startswith("# TYPE")
    }
    of_items = [line for line in merged.splitlines() if line.startswith("rm_items_total{")]
    assert len(of_items) == 2 * len(OUTCOMES)


def test_merging_accepts_replicas_of_different_versions() -> None:
    """A family that only one replica has is preserved; text and bytes are both read."""
    old = "# HELP rm_old_total Gone.\n# TYPE rm_old_total counter\nrm_old_total 3.0\n"

    merged = samples(merge_expositions({"old": old, "new": Metrics().render()}, incomplete=True))

    assert merged["rm_old_total", frozenset({("replica", "old")})] == 3
    assert merged["rm_ready", frozenset({("replica", "new")})] == 0


@pytest.mark.parametrize("incomplete", [True, False])
def test_missing_replica_is_published(incomplete: bool) -> None:
    """A metric shows whether a scrape reached every replica, because sums over the others are too low."""
    merged = samples(merge_expositions({}, incomplete=incomplete))

    assert merged == {("rm_metrics_scrape_incomplete", frozenset()): float(incomplete)}
