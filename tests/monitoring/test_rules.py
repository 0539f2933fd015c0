"""Scrape configuration, rules and alerts pass Prometheus' own tools, and name only exported metrics."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_tools import run

from service.metrics import Metrics, merge_expositions
from service.records import ModelIdentity

HERE = Path(__file__).parent
FOLDER = HERE.parents[1] / "monitoring"
ALERT_TESTS = HERE / "alert_rules.test.yml"
REPLACED_REPLICA = Path(__file__).with_name("replaced_replica.test.yml")
SCRAPED = {"up"}
"""Series that Prometheus adds."""


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def exposition() -> str:
    """The merged exposition of two replicas with a calibration."""
    metrics = Metrics()
    metrics.describe_model(ModelIdentity("model", "v1"), sha256="ab", dtype="float32", device="cpu")
    metrics.describe_build("0.1.0", "unknown")
    metrics.describe_calibration("sha256:ab", n_cal=1000, n_prompts=500, created_s=1.7e9)
    return merge_expositions({"a": metrics.render(), "b": metrics.render()}, incomplete=False)


def exported_names() -> set[str]:
    """Names of all samples that a replica can export, those of labelled families without children included."""
    families = list(text_string_to_metric_families(exposition()))
    suffixes = {
        "counter": ["_total"],
        "histogram": ["_bucket", "_sum", "_count"],
        "gauge": [""],
    }
    return {family.name + suffix for family in families for suffix in suffixes[family.type]}


def metrics_in(expr: str) -> set[str]:
    """Names of the metrics in a query; recorded ones keep their colons."""
    without_texts = re.sub(r'"[^"]*"', "", expr)
    return set(re.findall(r"[a-z_]+(?::[a-z0-9_]+)+|rm_[a-z0-9_]+", without_texts))


def test_metric_names_pass_the_lint() -> None:
    """Promtool finds no fault with any name, unit or help text, also after replicas were merged."""
    assert run("promtool", "check", "metrics", given=exposition()) == ""


def test_configuration_is_valid() -> None:
    """Promtool accepts the scrape configuration with all rules, and amtool the example for Alertmanager."""
    assert "SUCCESS" in run("promtool", "check", "config", FOLDER / "prometheus.yml")
    assert "SUCCESS" in run("amtool", "check-config", FOLDER / "alertmanager.yml")


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [(["severity=critical", "alertname=RewardNotFinite"], "paging"), (["severity=warning"], "reading")],
)
def test_alerts_reach_their_receiver(labels: list[str], receiver: str) -> None:
    """Critical alerts are routed to the pager, the others to be read later."""
    routed = run("amtool", "config", "routes", "test", f"--config.file={FOLDER / 'alertmanager.yml'}", *labels)

    assert routed.split()[0] == receiver


def test_unit_tests_of_the_alerts_pass() -> None:
    """The unit tests of the alerts pass: each fires on its stream, and does not on a similar one."""
    assert "SUCCESS" in run("promtool", "test", "rules", ALERT_TESTS)


def test_increase_counts_over_replaced_replicas() -> None:
    """A killed replica takes its counters along: the sum of values falls, the documented sum of increases does not."""
    assert "SUCCESS" in run("promtool", "test", "rules", REPLACED_REPLICA)
    assert "sum(increase(rm_items_total" in (FOLDER.parent / "docs" / "monitoring.md").read_text()


def test_every_alert_is_tested_both_ways() -> None:
    """Every alert has a stream on which it fires and one on which it does not."""
    tested: dict[bool, set[str]] = {True: set(), False: set()}
    for test in yaml.safe_load(ALERT_TESTS.read_text())["tests"]:
        for case in test.get("alert_rule_test", []):
            alerts = case["exp_alerts"]
            tested[bool(alerts)].add(case["alertname"])
            # A second job below the threshold is a stream on which the alert does not fire.
            jobs = {re.findall(r'job="(\w+)"', series["series"])[0] for series in test["input_series"]}
            if alerts and jobs - {alert["exp_labels"].get("job") for alert in alerts}:
                tested[False].add(case["alertname"])
    names = {rule["alert"] for rule in rules("alert_rules.yml")}

    assert tested[True] == names
    assert tested[False] == names


def test_rules_name_what_is_exported() -> None:
    """Each metric of a rule is exported by the service or recorded by another rule; each recorded one is used."""
    recorded = {rule["record"] for rule in rules("recording_rules.yml")}
    used: set[str] = set()
    for rule in [*rules("recording_rules.yml"), *rules("alert_rules.yml")]:
        used |= metrics_in(rule["expr"])

    assert used - recorded - exported_names() - SCRAPED == set()
    assert recorded <= used | metrics_in((FOLDER / "dashboard.json").read_text().replace('\\"', '"').replace('"', " "))


def test_every_alert_has_its_annotations() -> None:
    """Each alert has a severity, a summary and a description."""
    for rule in rules("alert_rules.yml"):
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}, rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


def test_documentation_names_existing_alerts_and_metrics() -> None:
    """The page on monitoring names every alert, and no metric that is not exported."""
    page = (FOLDER.parent / "docs" / "monitoring.md").read_text()
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported_names()}

    assert set(re.findall(r"`(Reward[A-Z]\w+)`", page)) == {rule["alert"] for rule in rules("alert_rules.yml")}
    named = {name for name in re.findall(r"\brm_[a-z0-9_]+", page) if not name.endswith("_")}
    assert named - families - exported_names() == set()
