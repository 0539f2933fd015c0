"""``GET /v1/monitor`` with the oracle engine: items are monitored, separately by run; unknown values are null."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from service.assembly import assemble
from service.diagnostics.monitors.monitor import MonitorView
from service.engines.oracle import oracle_reward_of_text
from service.http.access_log import AccessLog
from service.http.open_requests import OpenRequests
from service.http.openapi import document
from service.http.routes import create_app
from service.settings import read_settings


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    served = assemble(read_settings({"model": {"engine": "oracle"}, "monitors": {"max_runs": 2}}))
    access_log = AccessLog(str(tmp_path / "log"))

    async def exposition() -> str:
        return served.metrics.render().decode()

    await served.scorer.start()
    app = create_app(served, exposition, access_log, OpenRequests())
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app") as asking:
        yield asking
    await served.scorer.stop(0.0)
    access_log.close()


def items(num_prompts: int, completions: int = 4) -> list[dict[str, str]]:
    return [
        {"prompt": f"prompt {n}", "completion": "word " * (1 + (7 * n + 3 * m) % 19)}
        for n in range(num_prompts)
        for m in range(completions)
    ]


async def score(client: httpx2.AsyncClient, asked: list[dict[str, str]], level: str = "basic", **headers: str) -> None:
    answer = await client.post("/v1/score", json={"items": asked, "diagnostics": level}, headers=headers)
    assert answer.status_code == 200, answer.text


async def monitor(client: httpx2.AsyncClient, **headers: str) -> dict[str, Any]:
    answer = await client.get("/v1/monitor", headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def value(found: dict[str, Any], name: str, scope: str | None = None) -> Any:
    (reading,) = (entry for entry in found["monitors"] if entry["name"] == name and entry["scope"] == scope)
    return reading["value"]


@pytest.mark.parametrize("level", ["none", "basic", "full"])
async def test_scored_items_are_monitored_at_every_level(client: httpx2.AsyncClient, level: str) -> None:
    """The correlation of reward and length is that of the scored items, at every level of diagnostics."""
    asked = items(20)
    await score(client, asked, level)

    found = await monitor(client)

    rewards = np.array([oracle_reward_of_text(item["prompt"], item["completion"]) for item in asked])
    lengths = np.log1p([len(item["completion"].encode()) for item in asked])
    assert found["window"]["items"] == 80
    assert found["window"]["prompts"] == 20
    assert value(found, "reward_length_corr", "pooled") == pytest.approx(np.corrcoef(rewards, lengths)[0, 1], rel=1e-9)
    assert found["calibrated"] is False
    assert value(found, "ood_rate") is None
    assert found["cusum"]["signals"] == []


@pytest.mark.parametrize(("level", "batches"), [("none", 0), ("basic", 2), ("full", 2)])
async def test_the_wording_is_compared_where_texts_are_read(
    client: httpx2.AsyncClient, level: str, batches: int
) -> None:
    """Texts are compared at the levels that read them, by prompt, over requests."""
    for _ in range(3):
        await score(client, items(100, 1), level)

    found = (await monitor(client))["drift"]

    assert found["batches"] == batches
    assert [(entry["against"], entry["alarm"]) for entry in found["comparisons"]] == [("start", False)]
    assert found["comparisons"][0]["recent_items"] == batches * 128


async def test_siblings_are_found_across_a_request(client: httpx2.AsyncClient) -> None:
    """Completions of one prompt are siblings at any position in a request; those of another request are not."""
    asked = items(6, 2)
    await score(client, asked[::2] + asked[1::2])
    await score(client, asked[:2])

    found = await monitor(client)

    assert found["window"]["prompts"] == 7
    assert found["window"]["ess"]["within"] == 14 - 7 - 2


async def test_items_without_a_reward_are_not_monitored(client: httpx2.AsyncClient) -> None:
    """An item error is not an observation."""
    await score(client, [*items(2), {"prompt": "p", "completion": "c" * 5000}])

    assert (await monitor(client))["window"]["items"] == 8


async def test_runs_are_separate(client: httpx2.AsyncClient) -> None:
    """A run has its own items, the common window has all, and the least recently seen run is dropped."""
    for run, num_prompts in (("ppo:1", 1), ("ppo:2", 2), ("ppo:3", 3)):
        await score(client, items(num_prompts), **{"X-Run-Id": run})

    assert (await monitor(client))["window"]["items"] == 24
    assert (await monitor(client))["runs"] == ["ppo:2", "ppo:3"]
    third = await monitor(client, **{"X-Run-Id": "ppo:3"})
    assert (third["run"], third["window"]["items"]) == ("ppo:3", 12)
    forgotten = await client.get("/v1/monitor", headers={"X-Run-Id": "ppo:1"})
    assert (forgotten.status_code, forgotten.json()["code"]) == (404, "run_not_found")


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, "ü"])
@pytest.mark.parametrize("route", ["/v1/monitor", "/v1/score"])
async def test_malformed_run_id_is_refused(client: httpx2.AsyncClient, route: str, name: str) -> None:
    """A run id outside the pattern is an error and does not become another run."""
    headers = {b"X-Run-Id": name.encode("latin-1")}
    asking: Callable[[], Any] = (
        (lambda: client.post(route, json={"items": items(1)}, headers=headers))
        if route == "/v1/score"
        else (lambda: client.get(route, headers=headers))
    )

    answer = await asking()

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_metrics_are_up_to_date_at_every_scrape(client: httpx2.AsyncClient) -> None:
    """Counters of the monitors include every answered item at once, not only those of full batches."""
    await score(client, items(3))

    exposition = (await client.get("/metrics")).text

    assert 'rm_moment_total{scope="pooled",stat="n"} 12.0' in exposition
    assert 'rm_moment_total{scope="within",stat="groups"} 3.0' in exposition
    assert "rm_pairs_total 18.0" in exposition


async def test_answer_is_documented(client: httpx2.AsyncClient) -> None:
    """Every member of the answer is in the OpenAPI document."""
    await score(client, items(3))
    found = await monitor(client)

    schema = document()["paths"]["/v1/monitor"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]

    assert set(found) == set(schema["properties"])
    assert set(found["monitors"][0]) == set(schema["properties"]["monitors"]["items"]["properties"])


async def test_missing_replicas_are_reported(tmp_path: Path) -> None:
    """The answer reports that some replica is missing."""
    served = assemble(read_settings({"model": {"engine": "oracle"}}))
    access_log = AccessLog(str(tmp_path / "log"))

    async def exposition() -> str:
        return ""

    async def gathering(run_id: str | None) -> MonitorView:
        view = served.monitors.view(run_id)
        return MonitorView(view.state, ("other",), incomplete=True)

    app = create_app(served, exposition, access_log, OpenRequests(), monitors=gathering)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://app") as client:
        found = await monitor(client)
    access_log.close()

    assert found["incomplete"] is True
    assert found["runs"] == ["other"]
