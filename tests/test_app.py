"""The HTTP application without Ray: it runs in this process, with the oracle engine."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import httpx2
import pytest
from backports import zstd
from reward_client.answers import join_scores, read_scores
from reward_client.diagnostics import GroupBlock, LengthBlock
from reward_client.models import read_model
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from service import errors
from service.assembly import ServedModel, assemble
from service.engines.oracle import OracleEngine, OracleFaults, byte_tokenizer, oracle_reward_of_text
from service.errors import HttpError, Overloaded, RetryLater
from service.http.access_log import AccessLog
from service.http.open_requests import OpenRequests
from service.http.page_routes import FILES
from service.http.ray_headers import RayHeadersMiddleware, proxy_middlewares
from service.http.routes import create_app
from service.pipeline import Pipeline
from service.protocols.problem import MEDIA_TYPE, render_problem, retry_after_s
from service.scorer import Scorer
from service.settings import Settings, read_settings
from service.tokenization import Tokenization

CANARY = "canary-4c1d"
ITEM = {"prompt": "p", "completion": "c"}
JSON = {"Content-Type": "application/json"}


class App:
    """The application of an oracle engine, a client for it, and its access log."""

    def __init__(self, served: ServedModel, log: Path) -> None:
        self.served = served
        self.open_requests = OpenRequests()
        self._log = log
        self._access_log = AccessLog(str(log))
        self.asgi_app = create_app(served, self._exposition, self._access_log, self.open_requests)
        transport = httpx2.ASGITransport(self.asgi_app)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://app")

    async def _exposition(self) -> str:
        return self.served.metrics.render().decode()

    async def post(self, body: Any, route: str = "/v1/score", **headers: str) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.client.post(route, content=content, headers=JSON | headers)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of the log; closes it."""
        self._access_log.close()
        return [json.loads(line) for line in self._log.read_text().splitlines()]


Start: TypeAlias = Callable[..., AbstractAsyncContextManager[App]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts an application with the given settings and faults of the oracle."""

    @asynccontextmanager
    async def start_app(faults: OracleFaults | None = None, *, warm: bool = True, **tree: Any) -> AsyncIterator[App]:
        settings = read_settings({"model": {"engine": "oracle", "max_input_tokens": 64}} | tree)
        served = assemble(settings)
        if faults is not None:
            served = replace(served, scorer=faulty_scorer(served, settings, faults))
        app = App(served, tmp_path / "requests.jsonl")
        if warm:
            await served.scorer.start()
        try:
            yield app
        finally:
            await app.client.aclose()
            if warm:
                await served.scorer.stop(0.0)
            app.lines()

    return start_app


def faulty_scorer(served: ServedModel, settings: Settings, faults: OracleFaults) -> Scorer:
    engine = OracleEngine(max_input_tokens=64, max_batch_tokens=64, faults=faults)
    tokenization = Tokenization(byte_tokenizer(64), settings.tokenization, max_input_tokens=64, vocab_size=257)
    return Scorer(tokenization, Pipeline(engine), settings.limits, settings.batching, served.metrics)


@pytest.fixture
async def app(start: Start) -> AsyncIterator[App]:
    async with start() as running:
        yield running


def assert_problem(answer: httpx2.Response, status: int, code: str) -> None:
    problem = answer.json()
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, MEDIA_TYPE)
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["type"] == f"urn:reward-service:problem:{code}"
    assert problem["title"]
    assert problem["detail"]
    assert problem["instance"] == f"urn:request:{answer.headers['X-Request-Id']}"
    assert CANARY not in answer.text


async def test_rewards_come_back_in_order(app: App) -> None:
    """Each item's result has its index, its id, and the oracle's reward, bit for bit."""
    items = [{"prompt": f"p{n}", "completion": "c", "id": f"id-{n}"} for n in range(50)]

    answer = await app.post({"items": items})

    assert answer.status_code == 200
    assert [(result["index"], result["id"], result["reward"]) for result in answer.json()["results"]] == [
        (n, f"id-{n}", oracle_reward_of_text(f"p{n}", "c")) for n in range(50)
    ]


async def test_headers_of_an_answer(app: App) -> None:
    """An answer with rewards has headers for the request id, the model version, the activation and the timings."""
    answer = await app.post({"items": [ITEM]}, **{"X-Request-Id": "run-7:step.3"})

    assert answer.headers["X-Request-Id"] == "run-7:step.3"
    assert answer.headers["X-Model-Version"] == answer.json()["model"]["version"]
    assert answer.headers["X-Reward-Activation"] == "none"
    stages = [stage.partition(";dur=")[0] for stage in answer.headers["Server-Timing"].split(", ")]
    assert stages == ["parse", "tokenize", "queue", "engine", "total"]


@pytest.mark.parametrize("given", ["x" * 129, "a b", "a\tb", "ü".encode().decode("latin-1"), ""])
async def test_request_id_that_could_not_be_logged(app: App, given: str) -> None:
    """A request id outside the pattern is replaced and not echoed."""
    answer = await app.client.get("/livez", headers={b"X-Request-Id": given.encode("latin-1")})

    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"run-7", True), ("ü".encode(), False), (b"\xff\xfe", False), (b"a b", False), (None, False)],
)
async def test_request_id_before_ray(given: bytes | None, kept: bool) -> None:
    """The middleware for Ray's HTTP servers leaves exactly one id in the headers, which is ASCII and can be logged."""
    seen: list[list[tuple[bytes, bytes]]] = []

    async def inner(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["headers"])

    headers = [(b"host", b"h"), *([] if given is None else [(b"x-request-id", given)])]
    await RayHeadersMiddleware(inner)({"type": "http", "headers": headers}, no_message, no_send)

    (host, (name, value)) = seen[0]
    assert [repr(middleware) for middleware in proxy_middlewares()] == ["Middleware(RayHeadersMiddleware)"]
    assert (host, name) == ((b"host", b"h"), b"x-request-id")
    assert value == given if kept else re.fullmatch(rb"[0-9a-f]{32}", value)


async def test_no_header_of_a_client_steers_ray() -> None:
    """Headers by which a client would switch off cancellation or Ray's timeout, or that Ray cannot decode, are gone."""
    seen: list[list[tuple[bytes, bytes]]] = []

    async def inner(scope: Scope, _receive: Receive, _send: Send) -> None:
        seen.append(scope["headers"])

    steering = [
        (b"x-request-disconnect-disabled", b"?1"),
        (b"x-request-timeout-seconds", b"0.5"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"serve-multiplexed-model-id", b"m"),
        (b"x-session-id", b"\xff"),
        (b"traceparent", b"\xff"),
        (b"\xff", b"1"),
    ]
    passing = [(b"x-run-id", b"\xff"), (b"traceparent", b"00-1-2-01")]
    await RayHeadersMiddleware(inner)({"type": "http", "headers": [*steering, *passing]}, no_message, no_send)
    assert seen[0][:-1] == passing


async def no_message() -> Message:
    raise NotImplementedError


async def no_send(_message: Message) -> None:
    raise NotImplementedError


async def test_item_error_in_place(app: App) -> None:
    """An item over the token limit has an error and no reward; the other items of the request have rewards."""
    answer = await app.post({"items": [ITEM, {"prompt": "p" * 60, "completion": "c" * 10}, ITEM]})

    first, second, third = answer.json()["results"]
    assert answer.status_code == 200
    assert first["reward"] == third["reward"] == oracle_reward_of_text("p", "c")
    assert second["error"]["code"] == "sequence_too_long"
    assert "reward" not in second


async def test_levels_of_diagnostics_change_no_reward(app: App) -> None:
    """``none`` has no diagnostics, the other levels have the length block, and all have the same reward."""
    answers = [(await app.post({"items": [ITEM], "diagnostics": level})).json() for level in ("none", "basic", "full")]

    none, basic, full = (answer["results"][0] for answer in answers)
    assert none["reward"] == basic["reward"] == full["reward"]
    assert "length" not in none
    assert basic["length"] == full["length"]
    assert basic["length"]["completion_tokens"] == 1


async def test_comparison(app: App) -> None:
    """A comparison has the rewards of the completions and the probability that one is preferred to the other."""
    answer = await app.post({"prompt": "p", "completions": ["a", "b"]}, "/v1/compare")

    comparison = answer.json()
    assert comparison["rewards"] == [oracle_reward_of_text("p", "a"), oracle_reward_of_text("p", "b")]
    assert answer.headers["X-Reward-Activation"] == "none"
    assert sum(row[0] + row[1] for row in comparison["probabilities"]) == pytest.approx(2.0)


async def test_comparison_with_an_item_error(app: App) -> None:
    """One completion without a reward fails the comparison with its error."""
    answer = await app.post({"prompt": "p", "completions": ["a", "b" * 100]}, "/v1/compare")

    assert_problem(answer, 422, "sequence_too_long")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (CANARY.encode(), 400, "malformed_body"),
        (b'{"items": NaN}', 400, "malformed_body"),
        (b'{"items": [{"text": "\xff' + CANARY.encode() + b'"}]}', 400, "malformed_body"),
        (b'{"items": [{"text": "' + CANARY.encode() + rb'\ud800"}]}', 422, "invalid_request"),
        ({CANARY: 1, "items": [ITEM]}, 422, "invalid_request"),
        ({"items": []}, 422, "invalid_request"),
        ({"items": [{"prompt": CANARY}]}, 422, "invalid_request"),
        ({"items": [{"prompt": 3, "completion": CANARY}]}, 422, "invalid_request"),
        ({"items": [ITEM], "timeout_ms": 0}, 422, "invalid_request"),
        ({"items": [ITEM] * 2049}, 413, "too_many_items"),
        ({"items": [{"text": CANARY * 20_000}]}, 413, "item_too_long"),
    ],
)
async def test_refusals_on_the_wire(app: App, body: Any, status: int, code: str) -> None:
    """Each kind of invalid request is a problem with its own status and code, without any part of the body."""
    assert_problem(await app.post(body), status, code)


async def test_violations_have_pointers(app: App) -> None:
    """A problem about a field has the pointer to it."""
    answer = await app.post({"items": [ITEM, {"text": 3}]})

    assert answer.json()["errors"] == [{"pointer": "/items/1/text", "code": "wrong_type"}]


@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", f"/{CANARY}", 404, "not_found"),
    ("GET", "/v1/score", 405, "method_not_allowed"),
    ("DELETE", "/livez", 405, "method_not_allowed"),
])  # fmt: skip
async def test_framework_errors_are_problems(app: App, method: str, path: str, status: int, code: str) -> None:
    """Unknown routes and methods are problems with the usual headers."""
    answer = await app.client.request(method, path)

    assert_problem(answer, status, code)
    assert "X-Model-Version" in answer.headers
    assert ("Allow" in answer.headers) == (status == 405)


async def test_framework_errors_say_what_there_is(app: App) -> None:
    """A 405 lists the methods of the route in Allow; a 404 names the nearest route, if there is one."""
    wrong_method = await app.client.get("/v1/score")
    read_only = await app.client.request("BREW", "/livez")
    near = await app.client.post("/v1/scores", json={})
    far = await app.client.get("/docs")

    assert (wrong_method.headers["Allow"], wrong_method.json()["detail"]) == ("POST", "This route takes POST")
    assert (read_only.headers["Allow"], read_only.json()["detail"]) == ("GET, HEAD", "This route takes GET, HEAD")
    assert near.json()["detail"] == "There is no such route here; did you mean /v1/score?"
    assert far.json()["detail"] == "There is no such route here; /openapi.json lists the routes"


async def test_every_get_route_answers_head(app: App) -> None:
    """HEAD has the status and the headers of GET."""
    routes = [route for route in app.asgi_app.routes if isinstance(route, Route) and "GET" in (route.methods or set())]
    assert {"/livez", "/readyz", "/v1/model", "/v2", "/v2/models/{model}"} < {route.path for route in routes}
    for route in routes:
        path = route.path.format(model="m", version="1")
        got, head = await app.client.get(path), await app.client.head(path)
        assert (head.status_code, head.headers["Content-Type"]) == (got.status_code, got.headers["Content-Type"])


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v1/model", "/v1/monitor", "/metrics", "/openapi.json"])
async def test_slash_at_the_end_of_a_path_is_ignored(app: App, path: str) -> None:
    """A path with slashes at its end is answered as the path without them, and not redirected."""
    plain, *slashed = [await app.client.get(path + slashes) for slashes in ("", "/", "//")]

    assert plain.status_code == 200
    assert [answer.status_code for answer in slashed] == [200, 200]


async def test_slash_at_the_end_of_a_scoring_route(app: App) -> None:
    """The same holds for a POST and its body, and the log has the route."""
    answer = await app.post({"items": [ITEM]}, "/v1/score/")
    missing = await app.client.get("/v1/")

    assert answer.json()["results"][0]["reward"] == oracle_reward_of_text("p", "c")
    assert_problem(missing, 404, "not_found")
    assert [line["route"] for line in app.lines()] == ["/v1/score", "other"]


async def test_health_aliases(start: Start) -> None:
    """``/healthz`` is ``/livez`` and ``/health`` is ``/readyz``, before and after the warm-up, also in the log."""
    async with start(warm=False) as app:
        before = [(await app.client.get(path)).status_code for path in ("/livez", "/healthz", "/readyz", "/health")]
        await app.served.scorer.start()
        after = [await app.client.get(path) for path in ("/livez", "/healthz", "/readyz", "/health")]
        await app.served.scorer.stop(0.0)
        lines = app.lines()

    assert before == [200, 200, 503, 503]
    assert after[0].json() == after[1].json() == {"status": "alive"}
    assert after[2].json() == after[3].json() == {"status": "ready"}
    assert [line["route"] for line in lines] == ["/readyz", "/readyz"]


async def test_wrong_content_type_is_told(app: App) -> None:
    """What curl sends without a header is refused with the header to send."""
    answer = await app.client.post(
        "/v1/score", content=b"{}", headers={"Content-Type": "application/x-www-form-urlencoded"}
    )

    assert_problem(answer, 415, "unsupported_media_type")
    assert "send Content-Type: application/json" in answer.json()["detail"]


@pytest.mark.parametrize(
    "number", ["9" * 401, "-" + "9" * 5000, "1e400", "1e-9000000000"], ids=["401", "5000", "1e400", "tiny"]
)
@pytest.mark.parametrize(
    "field", ['"timeout_ms": %s', '"items": [{"token_ids": [%s]}]', '"items": [{"text": "", "id": %s}]']
)
async def test_no_number_is_a_500(app: App, field: str, number: str) -> None:
    """A number out of the range of its field is a 422 that gives the range, however many digits it has."""
    body = ('{"items": [{"text": "a"}], ' + field % number + "}").encode()

    answer = await app.post(body)

    assert_problem(answer, 422, "invalid_request")
    assert " from " in answer.json()["detail"]


async def test_null_and_integer_ids_on_the_wire(app: App) -> None:
    """What pydantic, Java and Go dump for absent fields is accepted, and ids come back as they were sent."""
    nulls = dict.fromkeys(("text", "token_ids", "group"))

    answer = await app.post({"items": [ITEM | nulls | {"id": 5}, ITEM | nulls | {"id": None}], "timeout_ms": 1000.0})

    first, second = answer.json()["results"]
    assert first["id"] == 5
    assert "id" not in second


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/json; charset=latin-1", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
async def test_content_types(app: App, content_type: str | None, status: int) -> None:
    """JSON in UTF-8 is accepted, also without a Content-Type; everything else is refused."""
    headers = {} if content_type is None else {"Content-Type": content_type}

    answer = await app.client.post("/v1/score", content=json.dumps({"items": [ITEM]}), headers=headers)

    assert answer.status_code == status


@pytest.mark.parametrize(("excess", "status"), [(-1, 200), (0, 200), (1, 413)])
@pytest.mark.parametrize("transfer", ["length", "chunked", "gzip", "zstd"])
async def test_limit_of_the_body(start: Start, transfer: str, excess: int, status: int) -> None:
    """The byte limit is exact: with Content-Length, in chunks without it, and after decompression."""
    limit = 1024
    empty = len(json.dumps({"items": [{"text": ""}]}))
    body = json.dumps({"items": [{"text": "a" * (limit + excess - empty)}]}).encode()
    assert len(body) == limit + excess

    async with start(limits={"max_request_bytes": limit}) as app:
        if transfer == "gzip":
            answer = await app.post(gzip.compress(body), **{"Content-Encoding": "gzip"})
        elif transfer == "zstd":
            answer = await app.post(zstd.compress(body), **{"Content-Encoding": "zstd"})
        elif transfer == "chunked":
            answer = await app.client.post("/v1/score", content=in_chunks(body), headers=JSON)
        else:
            answer = await app.post(body)

    assert answer.status_code == status
    if status == 413:
        assert_problem(answer, 413, "body_too_large")


async def in_chunks(body: bytes, size: int = 100) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), size):
        yield body[begin : begin + size]


async def test_endless_body_is_refused_early(start: Start) -> None:
    """An endless body is read no further than the limit, also with a wrong Content-Length."""
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 512
            yield b" " * 512

    async with start(limits={"max_request_bytes": 1024}) as app:
        answer = await app.client.post("/v1/score", content=endless(), headers=JSON | {"Content-Length": "10"})

    assert_problem(answer, 413, "body_too_large")
    assert read <= 2048


async def test_declared_length_over_the_limit(start: Start) -> None:
    """A Content-Length over the limit is refused before any byte of the body is read."""
    async with start(limits={"max_request_bytes": 1024}) as app:
        answer = await app.client.post("/v1/score", content=b"{}", headers=JSON | {"Content-Length": "1025"})

    assert_problem(answer, 413, "body_too_large")


@pytest.mark.parametrize(
    ("body", "coding", "status"),
    [
        (gzip.compress(b'{"items": [{"text": "a"}]}'), "gzip", 200),
        (gzip.compress(b" " * 10_000_000), "gzip", 413),
        (gzip.compress(b'{"items": []}')[:-4], "gzip", 400),
        (gzip.compress(b'{"items": []}') + b"x", "gzip", 400),
        (b'{"items": []}', "gzip", 400),
        (b"", "gzip", 400),
        (zstd.compress(b'{"items": [{"text": "a"}]}'), "zstd", 200),
        (zstd.compress(b" " * 10_000_000), "zstd", 413),
        (zstd.compress(b'{"items": []}')[:-4], "zstd", 400),
        (zstd.compress(b'{"items": []}') + b"x", "zstd", 400),
        (b'{"items": []}', "zstd", 400),
        (b"", "zstd", 400),
        (b'{"items": [{"text": "a"}]}', "identity", 200),
        (b"{}", "br", 415),
        (b"{}", "gzip, gzip", 415),
    ],
    ids=[
        *(
            f"{coding}-{kind}"
            for coding in ("gzip", "zstd")
            for kind in ("good", "bomb", "cut", "followed", "plain", "empty")
        ),
        *("identity", "br", "twice"),
    ],
)
async def test_content_codings(start: Start, body: bytes, coding: str, status: int) -> None:
    """Gzip and zstd are read under the same limit, which also holds for a bomb; other codings are refused."""
    async with start(limits={"max_request_bytes": 1_000_000}) as app:
        answer = await app.post(body, **{"Content-Encoding": coding})

    assert answer.status_code == status


def all_http_errors(root: type[HttpError] = HttpError) -> list[type[HttpError]]:
    return [root, *(below for child in root.__subclasses__() for below in all_http_errors(child))]


def example(error: type[HttpError]) -> HttpError:
    return error("7 tokens", 3.2) if issubclass(error, RetryLater) else error("7 tokens")


@pytest.mark.parametrize("error", all_http_errors(), ids=lambda error: error.__name__)
def test_every_error_renders(error: type[HttpError]) -> None:
    """Every error that can cross HTTP becomes a complete problem document."""
    problem = json.loads(render_problem(example(error), "id"))

    assert (problem["status"], problem["code"], problem["title"]) == (error.status, error.code, error.title)
    assert problem["retryable"] is error.retryable
    assert 400 <= error.status < 600


@pytest.mark.parametrize("error", all_http_errors(), ids=lambda error: error.__name__)
def test_retry_after_is_whole_seconds(error: type[HttpError]) -> None:
    """Every 503 and every refusal for a quota has a Retry-After of whole seconds, at least one; others have none."""
    waits = {retry_after_s(example(error), jitter) for jitter in (0.0, 0.5, 0.99)}

    assert (
        all(isinstance(wait, int) and wait >= 1 for wait in waits)
        if error.status in {429, 503} or error is RetryLater
        else waits == {None}
    )


def test_retry_after_is_spread() -> None:
    """Retry-After differs between refused clients, and is never before the queue has room."""
    waits = [retry_after_s(Overloaded("full", 40.0), jitter / 10) or 0 for jitter in range(10)]

    assert min(waits) == 40
    assert max(waits) == 50 - 1
    assert len(set(waits)) == 10


async def test_error_of_the_scorer_on_the_wire(start: Start) -> None:
    """An error of the scorer becomes a problem, with Retry-After if it is a 503."""
    async with start() as app:
        await app.served.scorer.stop(0.0)
        answer = await app.post({"items": [ITEM]})
        ready = await app.client.get("/readyz")

    assert_problem(answer, 503, "draining")
    assert_problem(ready, 503, "draining")
    assert int(answer.headers["Retry-After"]) >= 1


async def test_not_ready_before_the_warm_up(start: Start) -> None:
    """The replica is ready after the warm-up and not before; it is alive at once."""
    async with start(warm=False) as app:
        live = await app.client.get("/livez")
        before = await app.client.get("/readyz")
        await app.served.scorer.start()
        after = await app.client.get("/readyz")
        await app.served.scorer.stop(0.0)

    assert (live.status_code, after.status_code) == (200, 200)
    assert_problem(before, 503, "not_ready")
    assert int(before.headers["Retry-After"]) >= 1


async def test_overload_is_refused_with_a_time_to_return(start: Start) -> None:
    """With a full queue another request is a 503 with a Retry-After."""
    slow = OracleFaults(seconds_per_token=0.002)
    async with start(slow, limits={"max_queue_tokens": 60}) as app:
        items = [{"prompt": f"{n}", "completion": "c" * 50} for n in range(4)]
        answers = await asyncio.gather(*(app.post({"items": [item]}) for item in items * 2))

    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert_problem(answer, 503, "overloaded")
        assert int(answer.headers["Retry-After"]) >= 1


async def test_deadline_is_504(start: Start) -> None:
    """A request over its deadline gets a 504, not a 408, which some trainers treat as fatal."""
    async with start(OracleFaults(seconds_per_token=0.001)) as app:
        answer = await app.post({"items": [{"text": f"{n}" * 30} for n in range(20)], "timeout_ms": 20})

    assert_problem(answer, 504, "deadline_exceeded")


async def test_poison_and_nan_are_item_errors(start: Start) -> None:
    """An item on which the engine raises and one without a finite reward fail without failing others."""
    async with start(OracleFaults.by_control_bytes()) as app:
        answer = await app.post({"items": [ITEM, {"text": "\x01"}, {"text": "\x02"}, {"text": "\x03"}]})

    good, *bad = answer.json()["results"]
    assert good["reward"] == oracle_reward_of_text("p", "c")
    assert [result["error"]["code"] for result in bad] == ["engine_failed", "non_finite_reward", "non_finite_reward"]
    assert "NaN" not in answer.text
    assert not any("reward" in result for result in bad)


async def test_disconnected_client(start: Start) -> None:
    """When the client disconnects, its request is cancelled and logged as 499, and the next request is served."""
    async with start(OracleFaults(seconds_per_token=0.001)) as app:
        asking = asyncio.create_task(app.post({"items": [{"text": f"{n:04}" * 15} for n in range(100)]}))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        next_answer = await app.post({"items": [ITEM]})
        queued = app.served.scorer.queued_tokens
        lines = app.lines()

    assert next_answer.status_code == 200
    assert queued == 0
    assert [line["status"] for line in lines] == [499, 200]
    assert lines[0]["code"] == "client_gone"


async def test_unexpected_exception_is_a_500_without_details(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected exception is a 500 without details; the log has its class and frames, not its message."""

    async def explode(_request: object, **_: object) -> None:
        raise ZeroDivisionError(CANARY)

    monkeypatch.setattr(app.served.scorer, "score", explode)
    answer = await app.post({"items": [ITEM]})
    lines = app.lines()

    assert_problem(answer, 500, "internal_error")
    assert lines[0]["exception"] == "ZeroDivisionError"
    assert any("explode" in frame for frame in lines[0]["frames"])
    assert CANARY not in json.dumps(lines)


async def test_one_line_per_request_without_text(app: App) -> None:
    """Each request is logged as one JSON line of counts, durations and identifiers, without user text."""
    await app.post({"items": [{"prompt": CANARY, "completion": CANARY, "id": CANARY, "group": CANARY}]})
    await app.post({"items": [{"prompt": CANARY}], CANARY: CANARY})
    await app.post(CANARY.encode())
    await app.client.get(f"/{CANARY}?{CANARY}")
    await app.client.get("/readyz")
    lines = app.lines()

    assert [(line["status"], line["route"]) for line in lines] == [
        (200, "/v1/score"),
        (422, "/v1/score"),
        (400, "/v1/score"),
        (404, "other"),
    ]
    assert lines[0]["items"] == 1
    assert lines[0]["scored_tokens"] == 2 * len(CANARY)
    assert lines[0]["total_s"] >= lines[0]["engine_s"]
    assert CANARY not in json.dumps(lines)


async def test_metrics_count_what_was_answered(app: App) -> None:
    """The exposition is in Prometheus' format and counts requests by route and by status or code."""
    await app.post({"items": [ITEM]})
    await app.post({"items": []})

    answer = await app.client.get("/metrics")

    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'rm_requests_total{code="200",route="/v1/score"} 1.0' in answer.text
    assert 'rm_requests_total{code="invalid_request",route="/v1/score"} 1.0' in answer.text


async def test_model_route(app: App) -> None:
    """The model route reports version, forward path, pooling, template and every limit."""
    model = (await app.client.get("/v1/model")).json()

    assert model["model"] == {"name": "oracle", "version": app.served.identity.version}
    assert (model["activation"], model["pooling"], model["template"]) == ("none", "hf", "concat")
    assert model["limits"]["max_input_tokens"] == 64
    assert set(app.served.settings.limits.model_dump()) < set(model["limits"])


async def test_client_reads_what_the_service_sends(app: App) -> None:
    """The records of the client take the model and the diagnostics of a real answer."""
    described = await app.client.get("/v1/model")
    body = {"items": [ITEM, ITEM | {"id": 7}], "diagnostics": "full"}
    scored = join_scores([read_scores((await app.post(body)).content, num_items=2)])

    model = read_model(described.content)
    assert (model.name, model.version) == ("oracle", app.served.identity.version)
    assert (model.engine.engine, model.template, model.activation) == ("oracle", "concat", "none")
    assert (model.calibration.id, model.limits["max_input_tokens"]) == (None, 64)
    assert model.description == described.json()
    assert scored[1].id == 7
    last_token_id = ITEM["completion"].encode()[-1]
    length = LengthBlock(1, 1, 1, 2, truncated=False, last_token_id=last_token_id, double_bos=False, special_tokens=0)
    assert scored[1].details.length == length
    assert scored[1].details.group == GroupBlock(2, None, 0.0)
    assert scored[1].details.calibration == "missing"


async def test_openapi_matches_the_routes(app: App) -> None:
    """The document describes exactly the routes and methods that exist, and every reference in it resolves."""
    document = (await app.client.get("/openapi.json")).json()

    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    # HTTP has HEAD for every GET, so the document does not list it.
    routes = [route for route in app.asgi_app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.asgi_app.routes)
    assert {route.path for route in routes if not route.include_in_schema} == set(FILES)  # for browsers
    routes = [route for route in routes if route.include_in_schema]
    existing = {(route.path, method) for route in routes for method in (route.methods or set()) - {"HEAD"}}
    assert described == existing
    for reference in re.findall(r'"\$ref": ?"#/components/schemas/(\w+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]


async def test_openapi_declares_every_refusal(app: App) -> None:
    """Every status that a scoring route can return is declared."""
    document = (await app.client.get("/openapi.json")).json()

    declared = {int(status) for status in document["paths"]["/v1/score"]["post"]["responses"]}
    possible = {error.status for error in all_http_errors()} - {405, 499}
    assert declared == possible | {200}


async def test_shutdown_can_wait_for_open_requests(start: Start) -> None:
    """``wait_until_none`` returns once the last answer has been sent."""
    async with start(OracleFaults(seconds_per_token=0.002)) as app:
        await app.open_requests.wait_until_none(1.0)
        asking = asyncio.create_task(app.post({"items": [{"text": "a" * 60}]}))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(app.open_requests.wait_until_none(5.0))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        await waiting

        assert (await asking).status_code == 200


def test_error_codes_are_unique() -> None:
    """No two errors share a code unless one is the base of the other."""
    concrete = [
        error for error in all_http_errors() if error not in {HttpError, errors.RequestRefused, errors.ScoringFailed}
    ]

    codes = [error.code for error in concrete if "code" in vars(error)]
    assert len(codes) == len(set(codes))
