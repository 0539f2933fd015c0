"""A real server on each runtime: what only a running Ray Serve with its proxy, or a running uvicorn, can show."""

from __future__ import annotations

import json
import re
import socket
import time
from urllib.parse import urlsplit

import httpx2
import pytest
from serving import RunningServer, eventually

from service.engines.oracle import oracle_reward_of_text

HEALTH = [
    ("HEAD", "/livez"),
    ("HEAD", "/readyz"),
    ("GET", "/health"),
    ("GET", "/healthz"),
    ("GET", "/readyz/"),
    ("GET", "/metrics/"),
]
BODY = {"items": [{"prompt": "a", "completion": "b"}]}


def test_scores_over_http(server_url: str) -> None:
    """A reward arrives bit for bit, and each header arrives once."""
    answer = httpx2.post(f"{server_url}/v1/score", json=BODY, headers={"X-Request-Id": "run-1"})

    assert answer.status_code == 200
    assert answer.json()["results"][0]["reward"] == oracle_reward_of_text("a", "b")
    assert answer.headers.get_list("X-Request-Id") == ["run-1"]
    assert answer.headers["X-Model-Version"] == answer.json()["model"]["version"]
    assert answer.headers["X-Reward-Activation"] == "none"


def test_request_id_is_made_once(server_url: str) -> None:
    """A request without an id gets one, the same in header and problem."""
    answer = httpx2.post(f"{server_url}/v1/score", json={"items": []})

    assert answer.json()["instance"] == f"urn:request:{answer.headers['X-Request-Id']}"
    assert len(answer.headers.get_list("X-Request-Id")) == 1


@pytest.mark.parametrize(
    "given", ["ü".encode(), b"\xff\xfe", b"a b", b"x" * 129], ids=["utf-8", "bytes", "space", "long"]
)
def test_request_id_that_cannot_be_logged(server_url: str, given: bytes) -> None:
    """It is replaced before Ray's HTTP server reads it, which would answer 500 or echo it."""
    answer = httpx2.post(f"{server_url}/v1/score", json={"items": []}, headers=[(b"X-Request-Id", given)])

    (request_id,) = answer.headers.get_list("X-Request-Id")
    assert re.fullmatch("[0-9a-f]{32}", request_id)
    assert (answer.status_code, answer.json()["instance"]) == (422, f"urn:request:{request_id}")


def test_health_through_the_proxy(server_url: str) -> None:
    """Aliases, HEAD and a slash at the end are answered as without a proxy."""
    answers = [httpx2.request(method, server_url + path) for method, path in HEALTH]

    assert [answer.status_code for answer in answers] == [200] * len(HEALTH)
    assert [answer.content for answer in answers if answer.request.method == "HEAD"] == [b"", b""]


def test_wrong_method_through_the_proxy(server_url: str) -> None:
    """A 405 says which methods there are."""
    answer = httpx2.get(f"{server_url}/v1/score/")

    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")


def test_largest_request(server_url: str) -> None:
    """A request with as many items as the limit allows is answered completely and in order."""
    items = [{"prompt": f"{n}: ", "completion": "x" * (n % 97)} for n in range(2048)]

    answer = httpx2.post(f"{server_url}/v1/score", json={"items": items}, timeout=60)

    rewards = [result["reward"] for result in answer.json()["results"]]
    assert rewards == [oracle_reward_of_text(item["prompt"], item["completion"]) for item in items]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"items": NaN}', 400),
        (rb'{"items": [{"text": "\ud800"}]}', 422),
        (b'{"items": []}', 422),
        (json.dumps({"items": BODY["items"] * 2049}).encode(), 413),
        (b" " * (64 * 1024 * 1024 + 1), 413),
    ],
    ids=["json", "nan", "surrogate", "empty", "items", "bytes"],
)
def test_refusals_over_http(server_url: str, body: bytes, status: int) -> None:
    """Problems arrive unchanged, also for a body that is not read to its end."""
    answer = httpx2.post(f"{server_url}/v1/score", content=body, timeout=60)

    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert httpx2.post(f"{server_url}/v1/score", json=BODY).status_code == 200


def test_unknown_route_over_http(server_url: str) -> None:
    """An unknown route gets the service's problem, not a page of the HTTP server."""
    answer = httpx2.get(f"{server_url}/v2/nothing")

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_metrics_are_labelled(server_url: str) -> None:
    """One scrape labels samples with the replica, and reports that no replica is missing."""
    httpx2.post(f"{server_url}/v1/score", json=BODY)

    exposition = httpx2.get(f"{server_url}/metrics").text

    assert 'rm_requests_total{code="200",replica="' in exposition
    assert "rm_metrics_scrape_incomplete 0.0" in exposition


def test_disconnected_client_is_logged(oracle_server: RunningServer) -> None:
    """When a client closes its connection, its items are dropped and the request is logged with status 499."""
    items = [{"prompt": f"disconnecting {n} ", "completion": "y" * 3000} for n in range(300)]
    body = json.dumps({"items": items}).encode()
    address = urlsplit(oracle_server.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0))) as connection:
        head = (
            f"POST /v1/score HTTP/1.1\r\nHost: x\r\nX-Request-Id: disconnecting\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        time.sleep(0.05)

    def statuses() -> list[int]:
        lines = [json.loads(line) for line in oracle_server.output.read_text().splitlines()]
        return [line["status"] for line in lines if line["request_id"] == "disconnecting"]

    assert eventually(lambda: bool(statuses()), 20.0)
    assert statuses() == [499]


def test_no_text_reaches_any_log(oracle_server: RunningServer) -> None:
    """Text that a user sent is in no file that the server or Ray has written."""
    canary = "canary-5f0e9a"
    for body in ({"items": [{"prompt": canary, "completion": canary}]}, {"items": [{canary: canary}]}, canary):
        httpx2.post(f"{oracle_server.url}/v1/score", content=json.dumps(body).encode())
    time.sleep(1.0)

    logs = oracle_server.written_files()
    assert len(logs) > (10 if oracle_server.runtime == "ray" else 1)
    assert [path for path in logs if canary.encode() in path.read_bytes()] == []
