"""The dashboard in the repository is what the code writes, and asks only for what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_tools import run

from monitoring.dashboard import PATH, build_dashboard
from monitoring.panels import ROWS, Panel
from service.metrics import Metrics

PANELS = [panel for row in ROWS for panel in row.panels]
TARGETS = [query.expr for panel in PANELS for query in panel.queries]


def plan() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(PATH.read_text())
    return found


def test_json_is_what_the_code_writes() -> None:
    """Nobody edits the JSON by hand: python -m monitoring.dashboard writes it."""
    assert plan() == build_dashboard()


def test_dashboard_is_read_only_and_has_its_variables() -> None:
    """Changes belong into the code; the data source and the service are chosen by variables."""
    found = plan()

    assert found["editable"] is False
    assert [variable["name"] for variable in found["templating"]["list"]] == ["datasource", "job"]
    assert found["schemaVersion"] == 41
    drawn = [panel for panel in found["panels"] if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in drawn} == {"${datasource}"}


def test_titles_are_unique() -> None:
    """A panel is known by its title."""
    titles = [panel.title for panel in PANELS]

    assert len(titles) == len(set(titles))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.title)
def test_panel_is_complete(panel: Panel) -> None:
    """A panel says what it shows, in which unit, asks at least once, and asks for the chosen service only."""
    assert panel.description.endswith(".")
    assert panel.unit
    assert panel.queries
    assert panel.width <= 24
    for query in panel.queries:
        for selector in re.findall(r"\b(?:rm_\w+|[a-z_]+:[\w:]+)(\{[^}]*\})?", query.expr):
            assert 'job=~"$job"' in selector, query.expr


@pytest.mark.parametrize("expr", TARGETS)
def test_counters_stand_inside_rates(expr: str) -> None:
    """A counter or a bucket is never shown as it is, and rates take Grafana's interval or a whole hour."""
    for match in re.finditer(r"(\w*)\(?(rm_\w+_(?:total|bucket|count|sum))\{[^}]*\}(\[[^\]]*\])?", expr):
        assert match[1] in {"rate", "increase"}, expr
        assert match[3] in {"[$__rate_interval]", "[1h]"}, expr


def test_queries_name_what_is_exported() -> None:
    """Each metric of a panel exists in our registry or is recorded by a rule."""
    metrics = Metrics()
    metrics.describe_calibration("sha256:ab", n_cal=1000, n_prompts=500, created_s=1.7e9)
    text = metrics.render().decode()
    families = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    rules = yaml.safe_load((Path(PATH).parent / "recording_rules.yml").read_text())
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"]}

    for expr in TARGETS:
        for name in re.findall(r"[a-z_]+(?::[a-z0-9_]+)+|rm_[a-z0-9_]+", re.sub(r'"[^"]*"', "", expr)):
            base = re.sub(r"_(bucket|count|sum)$", "", name)
            assert name in recorded or name in families or base in families, name


def test_queries_are_promql(tmp_path: Path) -> None:
    """Promtool parses every query of every panel, its variables put in."""
    filled = [expr.replace("$__rate_interval", "1m").replace("$job", ".+") for expr in TARGETS]
    group = {"name": "panels", "rules": [{"record": f"panel:{n}", "expr": expr} for n, expr in enumerate(filled)]}
    path = tmp_path / "panels.yml"
    path.write_text(yaml.safe_dump({"groups": [group]}))

    assert f"{len(filled)} rules found" in run("promtool", "check", "rules", path)
