"""The compatibility protocols behind the proxy of a real server."""

from __future__ import annotations

import http.client
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from scored_texts import reward_of

pytestmark = pytest.mark.slow

ROUTES: list[tuple[str, dict[str, Any], list[str | int]]] = [
    ("/get_reward", {"query": ["text"], "prompts": ["t"], "labels": [None]}, ["rewards", 0]),
    ("/classify", {"model": "m", "input": "text", "use_activation": False}, ["data", -1, "probs", -1]),
    ("/v1/classify", {"input": "text"}, ["data", -1, "probs", -1]),
    ("/pooling", {"input": "text"}, ["data", 0, "data", 0]),
    ("/score", {"text_1": "a ", "text_2": "text"}, ["data", 0, "score"]),
    ("/v1/embeddings", {"model": "m", "input": "text"}, ["data", -1, "embedding", -1]),
    ("/v1/score", {"query": "a ", "items": ["text"]}, ["scores", 0, 0]),
    ("/v1/score/evaluation", {"model": "model", "messages": ["text"]}, ["scores", 0]),
    ("/rm", {"prompt": "a ", "response": "text", "label": None}, []),
    ("/rm?format=dict", {"prompt": "a ", "response": "text", "label": None}, ["reward"]),
    ("/predict", {"inputs": "text"}, [0, "score"]),
]


@pytest.mark.parametrize(("route", "body", "place"), ROUTES, ids=[route for route, _, _ in ROUTES])
def test_reward_through_the_proxy(server_url: str, route: str, body: dict[str, Any], place: list[str | int]) -> None:
    """The reward arrives bit for bit where the protocol's client reads it, with each header once."""
    answer = httpx2.post(server_url + route, json=body, headers={"X-Request-Id": "step-1"})

    value: Any = answer.json()
    for step in place:
        value = value[step]
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json")
    assert value == reward_of("a text" if "a " in body.values() else "text")
    for name in ("X-Request-Id", "X-Model-Version", "X-Reward-Activation"):
        assert len(answer.headers.get_list(name)) == 1


def test_binary_tensors_through_the_proxy(server_url: str) -> None:
    """A binary body without a Content-Type passes the proxy, and so do the health routes."""
    data = struct.pack("<I", 4) + b"text"
    tensor = {"name": "sentences", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor]}).encode()
    length = {"Inference-Header-Content-Length": str(len(header))}

    answer = httpx2.post(f"{server_url}/v2/models/m/versions/1/infer", content=header + data, headers=length)
    health = [httpx2.get(f"{server_url}/v2/{path}") for path in ("health/live", "health/ready", "models/m/ready")]

    assert answer.json()["outputs"][0]["data"] == [reward_of("text")]
    assert [answer.status_code for answer in health] == [200, 200, 200]


def test_a_connection_for_each_item(server_url: str) -> None:
    """256 calls at once, each with a TCP connection of its own, are all answered, each with its own reward."""

    def ask(number: int) -> tuple[int, float]:
        connection = http.client.HTTPConnection(urlsplit(server_url).netloc, timeout=60)
        body = json.dumps({"query": [f"text {number}"], "prompts": [""], "labels": [None]})
        connection.request("POST", "/get_reward", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        return answer.status, content["rewards"][0]

    with ThreadPoolExecutor(256) as pool:
        answers = list(pool.map(ask, range(512)))

    assert answers == [(200, reward_of(f"text {number}")) for number in range(512)]
