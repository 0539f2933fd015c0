"""What all compatibility protocols have in common: switches, model names, deadlines, metrics, the schema document."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from http_application import Application, application

from service.engines.oracle import NAN_BYTE, OracleFaults
from service.errors import SettingsError
from service.protocols.registry import PROTOCOLS, enabled_protocols
from service.settings import PROTOCOL_NAMES, read_settings

BODIES: dict[str, dict[str, Any]] = {
    "/get_reward": {"query": ["text"]},
    "/classify": {"input": "text"},
    "/v1/classify": {"input": "text"},
    "/pooling": {"input": "text"},
    "/score": {"text_1": "a ", "text_2": "text"},
    "/v1/score/evaluation": {"messages": ["text"]},
    "/rm": {"prompt": "a ", "response": "text"},
    "/rm/dict": {"prompt": "a ", "response": "text"},
    "/v1/embeddings": {"input": "text"},
    "/predict": {"inputs": "text"},
}
NAMED = {path: body for path, body in BODIES.items() if path != "/predict"}


def failing(body: dict[str, Any], control: str) -> dict[str, Any]:
    """The body with a text that makes the oracle fail."""
    return json.loads(json.dumps(body).replace('xt"', f'xt\\u{ord(control):04x}"')) if control else body


def test_every_protocol_is_registered() -> None:
    """Each name that the setting knows has its protocol, and the reverse."""
    assert [protocol.name for protocol in PROTOCOLS] == list(PROTOCOL_NAMES)


def test_deadlines_are_below_those_of_the_clients() -> None:
    """Each client would give up later than the service answers 504."""
    assert {protocol.name: protocol.deadline_s for protocol in PROTOCOLS} == {
        "openrlhf": 150.0,
        "vllm": 120.0,
        "llamafactory": 120.0,
        "slime": 100.0,
        "kserve": 50.0,
        "sglang": 120.0,
        "tei": 50.0,
    }


@pytest.mark.parametrize(
    ("enabled", "names"),
    [
        ("all", PROTOCOL_NAMES),
        ("none", ()),
        ("slime, openrlhf", ("openrlhf", "slime")),
        (["slime"], ("slime",)),
        ([], ()),
    ],
)
def test_switches(enabled: Any, names: tuple[str, ...]) -> None:
    """The setting lists protocols, as text or as a list."""
    settings = read_settings({"protocols": {"enabled": enabled}}).protocols

    assert settings.names == names
    assert [protocol.name for protocol in enabled_protocols(settings)] == list(names)


def test_unknown_protocol() -> None:
    """A name that is no protocol stops the start and says which there are."""
    with pytest.raises(SettingsError, match=r"protocols\.enabled: .*openrlhf, vllm"):
        read_settings({"protocols": {"enabled": "openrlhf,nope"}})


async def test_disabled_protocols_have_no_routes(tmp_path: Path) -> None:
    """A protocol that is switched off has neither routes nor schemas, and the shared path is native alone."""
    async with application(tmp_path, protocols={"enabled": "slime"}) as oracle:
        statuses = {path: (await oracle.post(path, body)).status_code for path, body in BODIES.items()}
        foreign = await oracle.post("/v1/score", {"query": "q", "items": ["a"]})
        paths = (await oracle.client.get("/openapi.json")).json()["paths"]

    assert {path for path, status in statuses.items() if status == 200} == {"/rm", "/rm/dict"}
    assert {status for path, status in statuses.items() if not path.startswith("/rm")} == {404}
    assert foreign.status_code == 422
    assert set(paths) & set(BODIES) == {"/rm", "/rm/dict"}


@pytest.mark.parametrize("path", BODIES)
async def test_headers_and_content_type(oracle: Application, path: str) -> None:
    """Answers and errors are declared as JSON and have the request id and the model version."""
    good = await oracle.post(path, BODIES[path], **{"X-Request-Id": "r-1"})
    bad = await oracle.post(path, failing(BODIES[path], chr(NAN_BYTE)), **{"X-Request-Id": "r-1"})

    assert (good.status_code, bad.status_code) == (200, 500)
    assert bad.json()["code"] == "non_finite_reward"
    assert good.headers["X-Reward-Activation"] == "none"
    assert "X-Reward-Activation" not in bad.headers
    for answer in (good, bad):
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Request-Id"] == "r-1"
        assert answer.headers["X-Model-Version"] == "oracle"


@pytest.mark.parametrize("path", BODIES)
async def test_unknown_fields_are_ignored(oracle: Application, path: str) -> None:
    """Fields that a later version of a client may send change nothing."""
    plain = await oracle.post(path, BODIES[path])
    more = await oracle.post(path, BODIES[path] | {"new_field": [1], "other": {"a": None}})

    ignored = ("created", "id")
    assert more.status_code == 200
    assert without(more.json(), ignored) == without(plain.json(), ignored)


def without(body: Any, names: tuple[str, ...]) -> Any:
    return {name: value for name, value in body.items() if name not in names} if isinstance(body, dict) else body


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "credentials",
    [{"Authorization": "Bearer EMPTY"}, {"Authorization": "Basic YW55OmtleQ=="}, {"X-API-Key": "key"}],
    ids=["bearer", "basic", "key"],
)
async def test_credentials_that_clients_send_change_nothing(
    oracle: Application, path: str, credentials: dict[str, str]
) -> None:
    """A placeholder key, or a user in the URL, is no reason to refuse: there is nothing to check it against."""
    answer = await oracle.post(path, BODIES[path], **credentials)
    plain = await oracle.post(path, BODIES[path])

    assert answer.status_code == plain.status_code == 200
    assert plain.headers["X-Reward-Activation"] == answer.headers["X-Reward-Activation"] == "none"


async def test_model_names(tmp_path: Path) -> None:
    """Any name is answered by the served model; with strict names another one is a 404."""
    async with application(tmp_path) as oracle:
        lenient = [(await oracle.post(path, body | {"model": "other"})).status_code for path, body in NAMED.items()]
    async with application(tmp_path, protocols={"strict_model_names": True}) as oracle:
        other = [await oracle.post(path, body | {"model": "other"}) for path, body in NAMED.items()]
        own = [await oracle.post(path, body | {"model": "oracle"}) for path, body in NAMED.items()]
        absent = [await oracle.post(path, body) for path, body in NAMED.items()]

    assert set(lenient) == {200}
    assert {(answer.status_code, answer.json()["code"]) for answer in other} == {(404, "model_not_found")}
    assert {answer.status_code for answer in own + absent} == {200}


@pytest.mark.parametrize("path", [*BODIES, "/v1/score", "/v2/models/m/infer"])
async def test_deep_nesting(oracle: Application, path: str) -> None:
    """A body that is nested deeply is refused, in fields that are read, passed over or recognised by."""
    deep = b"[" * 50_000 + b"]" * 50_000
    for field in (b"labels", b"prompts", b"inputs", b"input", b"items", b"query", b"new_field"):
        answer = await oracle.post(path, b'{"text_1": "a", "query": ["q"], "' + field + b'": ' + deep + b"}")

        assert answer.status_code in {400, 422}
        assert answer.json()["code"] in {"malformed_body", "invalid_request"}


async def test_limits_of_the_service_hold(tmp_path: Path) -> None:
    """Items and characters over the limits are refused before any work, as on the native route."""
    async with application(tmp_path, limits={"max_request_items": 2, "max_item_chars": 8}) as oracle:
        many = await oracle.post("/classify", {"input": ["a"] * 3})
        long = await oracle.post("/get_reward", {"query": ["a" * 9]})

    assert (many.status_code, many.json()["code"]) == (413, "too_many_items")
    assert (long.status_code, long.json()["code"]) == (413, "item_too_long")


async def test_deadline(tmp_path: Path) -> None:
    """The deadline of the service ends a call with 504, which trainers repeat."""
    async with application(
        tmp_path, faults=OracleFaults(seconds_per_token=0.002), limits={"deadline_s": 0.02}
    ) as oracle:
        answer = await oracle.post("/classify", {"input": "a" * 60})

    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")


async def test_overload(tmp_path: Path) -> None:
    """A full queue is a 503 with Retry-After for clients that repeat, and a wait for those that do not."""
    slow = OracleFaults(seconds_per_token=0.002)
    async with application(tmp_path, faults=slow, limits={"max_queue_tokens": 200}) as oracle:
        texts = [f"{number:02}" * 25 for number in range(12)]
        repeating = await asyncio.gather(*(oracle.post("/classify", {"input": text}) for text in texts))
        waiting = await asyncio.gather(
            *(oracle.post("/rm", {"prompt": text, "response": ""}) for text in texts[:3]),
            *(oracle.post("/v1/score/evaluation", {"messages": [text]}) for text in texts[3:6]),
        )

    refused = [answer for answer in repeating if answer.status_code != 200]
    assert 0 < len(refused) < len(texts)
    for answer in refused:
        assert (answer.status_code, answer.json()["code"]) == (503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1
    assert [answer.status_code for answer in waiting] == [200] * 6


@pytest.mark.parametrize("path", BODIES)
async def test_metrics_by_route(oracle: Application, path: str) -> None:
    """Requests are counted under the path of the route; an alias counts as the route that it stands for."""
    await oracle.post(path, BODIES[path])

    route = {"/v1/classify": "/classify"}.get(path, path)
    value = oracle.served.metrics.registry.get_sample_value("rm_requests_total", {"route": route, "code": "200"})
    assert value == 1.0


async def test_monitors_by_run(oracle: Application) -> None:
    """``X-Run-Id`` names the run whose monitors observe the items, on these routes too."""
    refused = await oracle.post("/classify", {"input": "a"}, **{"X-Run-Id": "not an id"})

    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")


async def test_schema_document(oracle: Application) -> None:
    """The document has every route with the schemas of its bodies, and every reference in it resolves."""
    document = (await oracle.client.get("/openapi.json")).json()

    for path in BODIES:
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert set(operation["responses"]) >= {"400", "404", "413", "415", "422", "500", "503", "504"}
    assert (
        len(document["paths"]["/v1/score"]["post"]["requestBody"]["content"]["application/json"]["schema"]["anyOf"])
        == 3
    )
    for reference in re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]


def test_no_route_is_registered_twice() -> None:
    """No two routes share a path, except for bodies that are recognised on the native path."""
    paths = [
        path
        for protocol in PROTOCOLS
        for route in protocol.scoring
        if route.recognises is None
        for path in (route.path, *route.aliases)
    ] + [route.path for protocol in PROTOCOLS for route in protocol.reading]

    assert len(paths) == len(set(paths))
