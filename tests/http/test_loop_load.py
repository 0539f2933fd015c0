"""Requests that arrive while the event loop is behind: refused before anything of them is read, or counted as old."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from http_application import application
from starlette.types import Message, Receive, Scope, Send

from service.errors import Overloaded
from service.http import unread_refusals
from service.http.access_log import AccessLog
from service.http.loop_load import BEAT_S, LoopLoad
from service.http.open_requests import OpenRequests
from service.http.ray_headers import GATE, RayHeadersMiddleware
from service.http.unread_refusals import UnreadRefusals
from service.metrics import Metrics
from service.scheduling.request_gate import RequestGate

PATIENT = {"items": [{"text": "a"}]}
HURRIED = PATIENT | {"timeout_ms": 1000}


def slow_loop(monkeypatch: pytest.MonkeyPatch, lag_s: float = 0.1) -> None:
    """Make the loop look as if it handled 10 requests a second and were late."""
    monkeypatch.setattr(LoopLoad, "lag_s", lag_s)
    monkeypatch.setattr(RequestGate, "requests_per_s", 10.0)


async def test_requests_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even the longest recent deadline would be missed, a request gets 503 before its body is read."""
    num_read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal num_read
        num_read += 1
        yield json.dumps(PATIENT).encode()

    sent = asyncio.Event()

    async def held_body() -> AsyncIterator[bytes]:
        await sent.wait()
        yield json.dumps(PATIENT).encode()

    monkeypatch.setattr(unread_refusals, "COUNT_S", 0.1)
    async with application(tmp_path) as app:
        assert (await app.post("/v1/score", HURRIED)).status_code == 200
        held = asyncio.create_task(app.client.post("/v1/score", content=held_body()))
        await asyncio.sleep(0.05)
        slow_loop(monkeypatch, lag_s=0.6)
        monkeypatch.setattr(LoopLoad, "waited_s", 0.0)
        refusals = [await app.client.post("/v1/score", content=body()) for _ in range(3)]
        refusals.append(await app.client.post("/score/", content=body(), headers={"X-Request-Id": "mine"}))
        model = await app.client.get("/v1/model")
        assert model.status_code == 200, "only requests that may have to be computed are refused"
        assert num_read == 0
        for refusal in refusals:
            assert (refusal.status_code, refusal.json()["code"]) == (503, "overloaded")
            assert int(refusal.headers["Retry-After"]) >= 1
            assert refusal.headers["X-Model-Version"] == app.served.identity.version
        assert refusals[-1].headers["X-Request-Id"] == "mine"
        monkeypatch.setattr(LoopLoad, "lag_s", 0.0)
        sent.set()
        assert (await held).status_code == 200
        await asyncio.sleep(0.2)
        metrics = app.served.metrics.render().decode()
        assert 'rm_shed_total{reason="overloaded"} 4.0' in metrics
        assert 'rm_requests_total{code="overloaded",route="/v1/score"} 3.0' in metrics
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert sum(line["requests"] for line in lines if line["event"] == "refused") == 4


async def test_a_hurried_request_is_refused_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside patient callers a request is read; it is refused if its own deadline would be missed, and counted."""
    async with application(tmp_path) as app:
        assert (await app.post("/v1/score", PATIENT)).status_code == 200
        slow_loop(monkeypatch, lag_s=0.6)
        refusal = await app.post("/v1/score", HURRIED)
        assert (refusal.status_code, refusal.json()["code"]) == (503, "overloaded")
        assert (await app.post("/v1/score", PATIENT)).status_code == 200
        metrics = app.served.metrics.render().decode()
        assert 'rm_shed_total{reason="overloaded"} 1.0' in metrics
        assert 'rm_items_total{outcome="shed"} 1.0' in metrics


async def test_the_wait_for_the_loop_is_part_of_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waited in its socket for longer than its deadline allows is not computed."""
    async with application(tmp_path) as app:
        monkeypatch.setattr(LoopLoad, "waited_s", 2.0)
        late = await app.post("/v1/score", HURRIED)
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert (await app.post("/v1/score", PATIENT)).status_code == 200


async def test_the_lag_of_the_loop_is_measured() -> None:
    """A loop that something blocks is late by as much while requests are open, and nothing is measured without any."""
    open_requests = OpenRequests()
    load = LoopLoad(open_requests)
    assert load.lag_s == 0
    with open_requests:
        load.begin()
        await asyncio.sleep(3 * BEAT_S)
        assert load.waited_s < 2.0
        time.sleep(BEAT_S + 0.2)  # noqa: ASYNC251 - blocks the loop on purpose
        assert load.waited_s >= 0.2
        await asyncio.sleep(0.01)
        assert load.waited_s >= 0.2
    await asyncio.sleep(2 * BEAT_S + 0.1)
    assert load.lag_s == 0


async def test_a_loop_that_stops_without_requests_is_not_late() -> None:
    """After the last answer a pause of the loop is not counted as the wait of the next request."""
    open_requests = OpenRequests()
    load = LoopLoad(open_requests)
    with open_requests:
        load.begin()
        load.finish()
    time.sleep(BEAT_S + 0.2)  # noqa: ASYNC251 - as a process that is stopped
    with open_requests:
        load.begin()
        assert load.waited_s == 0


def test_requests_that_wait_for_their_client_are_not_the_loops() -> None:
    """A request whose body does not come is not counted as waiting for the loop."""
    open_requests = OpenRequests()
    load = LoopLoad(open_requests)
    with open_requests, open_requests, open_requests:
        load.num_receiving = 1
        assert load._num_waiting() == 2


async def test_requests_are_refused_before_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the loop is behind, a request for a route gets its 503 with its id and Ray does not see it; others pass."""
    seen: list[Scope] = []
    sent: list[Message] = []

    async def inner(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope)

    async def send(message: Message) -> None:
        sent.append(message)

    async def post(path: str, method: str = "POST") -> None:
        headers = [(b"x-request-id", b"run-7")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await RayHeadersMiddleware(inner)(scope, no_message, send)

    async def no_message() -> Message:
        raise AssertionError("nothing is read")

    log = AccessLog(str(tmp_path / "requests.jsonl"))
    routes = {"/v1/score": "/v1/score"}
    load = LoopLoad(OpenRequests())
    refusals = UnreadRefusals(load, Metrics(), log, model_version="v1", route_names=routes, echoes_request_id=False)
    monkeypatch.setattr(GATE, "refusals", refusals)
    await post("/v1/score")
    assert (len(seen), sent) == (1, [])
    monkeypatch.setattr(LoopLoad, "unread_refusal", lambda _: Overloaded("too much", 3.0))
    await post("/v1/score")
    await post("/other")
    await post("/v1/score", "GET")

    log.close()
    assert [scope["path"] for scope in seen] == ["/v1/score", "/other", "/v1/score"]
    assert [message.get("status") for message in sent] == [503, None]
    headers = dict(sent[0]["headers"])
    assert headers[b"x-request-id"] == b"run-7"
    assert int(headers[b"retry-after"]) >= 1
    assert json.loads(sent[1]["body"])["code"] == "overloaded"
