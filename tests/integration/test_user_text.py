"""Text of users stays in memory: no answer, log, metric, monitor or description repeats it."""

from __future__ import annotations

import json
from typing import Any

import httpx2
from mutations import BODIES
from serving import RunningServer

CANARY = "the-secret-of-a-user"
"""Also as what a careless message might make of it: in other cases, or cut."""

FORMS = (CANARY, CANARY.upper(), CANARY.replace("-", " "), CANARY[:10])


def with_canary(value: Any) -> Any:
    """The value with the canary as every string and as a further key of every object."""
    if isinstance(value, str):
        return f"{CANARY} {value}"
    if isinstance(value, list):
        return [with_canary(entry) for entry in value]
    if isinstance(value, dict):
        return {name: with_canary(entry) for name, entry in value.items()} | {CANARY: CANARY}
    return value


def bodies(path: str) -> list[bytes]:
    """A good body, where the route echoes no text, and bad ones of many kinds, all with the canary."""
    good = json.dumps(BODIES[path]).replace("canary-text-of-a-user", CANARY).encode()
    changed = json.dumps(with_canary(BODIES[path])).encode()
    return [
        good,
        changed,
        good[:-5],
        good.replace(b'"', b"'"),
        good.replace(CANARY.encode(), CANARY.encode() + b"\\ud800"),
        good.replace(CANARY.encode(), CANARY.encode() + b"\xff"),
        json.dumps({CANARY: CANARY}).encode(),
        json.dumps([CANARY]).encode(),
        json.dumps(CANARY).encode(),
        json.dumps({"items": [{"text": CANARY * 20_000}]}).encode(),
        json.dumps({"items": [{"token_ids": [CANARY]}], "truncation": CANARY, "timeout_ms": CANARY}).encode(),
    ]


def test_text_of_users_is_repeated_nowhere(oracle_server: RunningServer) -> None:
    """Bodies, paths, queries, headers and runs with a canary: it is in no answer, and in no file of the server."""
    answers: list[httpx2.Response] = []
    with httpx2.Client(base_url=oracle_server.url, timeout=30) as client:
        for path in BODIES:
            answers += [
                client.post(path, content=body, headers={"Content-Type": "application/json"}) for body in bodies(path)
            ]
        strange = {"X-Run-Id": f"{CANARY} {CANARY}", "X-Secret": CANARY, "Accept": CANARY, "Cookie": CANARY}
        answers += [
            client.get(f"/{CANARY}"),
            client.get(f"/v1/model/{CANARY}"),
            client.get("/v1/model", params={CANARY: CANARY}),
            client.post("/v1/score", content=b"{}", headers={"Content-Type": f"text/{CANARY}"}),
            client.post("/v1/score", content=b"{}", headers={"Content-Encoding": CANARY}),
            client.post("/v1/score", content=b"{}", headers=strange),
            client.request("PATCH", "/v1/score", content=CANARY.encode()),
        ]
        reads = [client.get(path) for path in ("/metrics", "/v1/monitor", "/v1/model", "/openapi.json", "/v2")]

    assert {200, 400, 404, 405, 415, 422} <= {answer.status_code for answer in answers}
    for answer in (*answers, *reads):
        assert not any(form in answer.text for form in FORMS), (answer.request.url.path, answer.status_code)
        assert not any(form in value for form in FORMS for value in answer.headers.values())
    for file in oracle_server.written_files():
        content = file.read_text(errors="replace")
        assert not any(form in content for form in FORMS), file


def test_the_canary_would_be_found() -> None:
    """The bodies have the canary, so that the test above looks for something."""
    assert all(any(form in body.decode(errors="replace") for form in FORMS) for body in bodies("/v1/score"))
