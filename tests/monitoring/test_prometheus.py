"""A real Prometheus scrapes the real service and evaluates every query of the dashboard."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import yaml
from prometheus_tools import tool
from serving import eventually, free_port, serving

from monitoring.dashboard import PATH
from monitoring.pictures import evaluate, unexplained
from monitoring.prometheus_api import Span, query_range
from monitoring.render import main
from service.engines.oracle import oracle_reward_of_text

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FOLDER = PATH.parent
DRIVE_S = 30.0
REPLICAS = 3


@dataclass(frozen=True)
class Observed:
    """A service under load, the Prometheus that scraped it, and all items that were scored."""

    service: str
    prometheus: str
    items: list[dict[str, str]]
    seconds: float


@contextmanager
def prometheus(folder: Path, service: str) -> Iterator[str]:
    """Run Prometheus with the shipped configuration, but every second, and on free ports."""
    config: dict[str, Any] = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["scrape_timeout"] = "1s"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [service.removeprefix("http://")]
    del config["alerting"]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [tool("prometheus"), f"--config.file={path}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        assert eventually(lambda: is_ready(address), 30.0), (folder / "prometheus.log").read_text()
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def is_ready(address: str) -> bool:
    try:
        return httpx2.get(f"http://{address}/-/ready", timeout=2.0).status_code == 200
    except httpx2.HTTPError:
        return False


def completion(rng: random.Random) -> str:
    """A text of varying length with every kind of style marker."""
    phrases = (
        "Plain words.\n",
        "# Heading\n",
        "- item\n",
        "**bold** ",
        "\N{PARTY POPPER} ",
        "perhaps ",
        "great question ",
    )
    return "".join(rng.choices(phrases, k=rng.randint(1, 40)))


def drive(url: str) -> list[dict[str, str]]:
    """Score groups of completions for a while; rewards are the oracle's, lengths vary."""
    rng = random.Random(0)
    sent: list[dict[str, str]] = []
    end = time.monotonic() + DRIVE_S
    with httpx2.Client(base_url=url, timeout=30.0) as client:
        while time.monotonic() < end:
            items = [
                {"prompt": f"prompt {len(sent)} {prompt}", "completion": completion(rng)}
                for prompt in range(4)
                for _ in range(4)
            ]
            answer = client.post(
                "/v1/score", json={"items": items, "diagnostics": "full"}, headers={"X-Run-Id": "drive"}
            )
            assert answer.status_code == 200
            sent += items
            time.sleep(0.05)
    return sent


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """Three replicas of the oracle, driven and scraped; everything that was scored has been scraped at the end."""
    folder = tmp_path_factory.mktemp("observed")
    tool("prometheus")
    with (
        serving(folder, "--engine", "oracle", "--replicas", str(REPLICAS)) as server,
        prometheus(folder, server.url) as url,
    ):
        time.sleep(5.0)  # increase() needs the zeros at which the counters begin
        begin = time.monotonic()
        sent = drive(server.url)
        time.sleep(4.0)
        yield Observed(server.url, url, sent, time.monotonic() - begin)


def latest(observed: Observed, expr: str) -> dict[str, float]:
    """The value of each series now, by its scope."""
    end = time.time()
    return {
        series.labels.get("scope", ""): float(series.values[-1])
        for series in query_range(observed.prometheus, expr, Span(end - 1, end, 1.0))
    }


def expected_correlations(observed: Observed) -> dict[str, float]:
    rewards = np.array([oracle_reward_of_text(item["prompt"], item["completion"]) for item in observed.items])
    lengths = np.log1p([len(item["completion"].encode()) for item in observed.items])
    prompts = np.unique([item["prompt"] for item in observed.items], return_inverse=True)[1]
    sizes = np.bincount(prompts)
    centred_rewards, centred_lengths = (
        column - (np.bincount(prompts, column) / sizes)[prompts] for column in (rewards, lengths)
    )
    return {
        "pooled": np.corrcoef(rewards, lengths)[0, 1],
        "within": np.corrcoef(centred_rewards, centred_lengths)[0, 1],
    }


def test_correlation_over_replicas_is_numpys(observed: Observed) -> None:
    """From the counters of three replicas PromQL computes numpy's correlation over all items, to 1e-9."""

    def moment(stat: str) -> str:
        return f'sum by (scope) (rm_moment_total{{stat="{stat}"}})'

    sum_r, sum_l = (f"({moment(f'z{of}_pos')} - {moment(f'z{of}_neg')})" for of in "rl")
    n = moment("n")
    expr = (
        f"(({moment('sum2')} - {moment('diff2')}) / 4 - {sum_r} * {sum_l} / {n})"
        f" / sqrt(({moment('zr2')} - {sum_r} ^ 2 / {n}) * ({moment('zl2')} - {sum_l} ^ 2 / {n}))"
    )

    found = latest(observed, expr)

    assert latest(observed, n) == {"pooled": len(observed.items), "within": len(observed.items)}
    assert found == pytest.approx(expected_correlations(observed), abs=1e-9)
    replicas = query_range(observed.prometheus, "rm_ready", Span(time.time() - 1, time.time(), 1.0))
    assert len(replicas) == REPLICAS


def test_recorded_correlation_is_close(observed: Observed) -> None:
    """The recording rule gives the same over its range, up to the extrapolation of increase()."""
    found = latest(observed, "job_scope:rm_reward_length_corr:1h")

    assert found == pytest.approx(expected_correlations(observed), abs=0.02)


def test_monitors_of_all_replicas_are_merged(observed: Observed) -> None:
    """GET /v1/monitor returns all replicas merged, from any replica, and a run separately."""
    answers = [
        httpx2.get(f"{observed.service}/v1/monitor", headers=headers).json()
        for headers in ({}, {}, {}, {"X-Run-Id": "drive"})
    ]

    for found in answers:
        assert found["window"]["replicas"] == REPLICAS
        assert found["incomplete"] is False
        assert found["window"]["items"] == len(observed.items)
        values = {
            entry["scope"]: entry["value"] for entry in found["monitors"] if entry["name"] == "reward_length_corr"
        }
        assert values == pytest.approx(expected_correlations(observed), abs=1e-9)
    unknown = httpx2.get(f"{observed.service}/v1/monitor", headers={"X-Run-Id": "nobody"})
    assert unknown.status_code == 404


def test_every_panel_shows_something(observed: Observed) -> None:
    """No query of the dashboard fails, and none is empty unless its panel states a reason."""
    end = time.time()

    panels = evaluate(json.loads(PATH.read_text()), observed.prometheus, Span(end - observed.seconds, end, 1.0))

    assert unexplained(panels) == []
    # Beside what needs a calibration, nothing hides behind a stated reason here.
    empty = {drawn.panel["title"]: drawn.empty_reason for drawn in panels if drawn.is_empty}
    stated = {"no monitor is in alarm.", "the model has one output."}
    assert all("calibration" in str(reason) or reason in stated for reason in empty.values()), empty


def test_no_alert_fires_without_cause(observed: Observed) -> None:
    """A healthy service raises no alert."""
    firing = httpx2.get(f"{observed.prometheus}/api/v1/alerts").json()["data"]["alerts"]

    assert [alert["labels"]["alertname"] for alert in firing if alert["state"] == "firing"] == []


def test_dashboard_is_drawn(observed: Observed, tmp_path: Path) -> None:
    """The command draws the dashboard into a picture."""
    picture = tmp_path / "dashboard.png"

    status = main([str(picture), "--url", observed.prometheus, "--minutes", f"{observed.seconds / 60:.2f}"])

    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
