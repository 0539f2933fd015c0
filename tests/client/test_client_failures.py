"""Whatever the server does, a call returns the rewards that the service computed, or raises the right exception."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import pytest
from misbehaving_server import FakeServer, Request, ok, problem, response, running, scores
from reward_client import AsyncRewardClient, ChunkLimits, RetryPolicy, RewardClient
from reward_client.errors import (
    BadAnswer,
    ClientDeadlineExceeded,
    ClientError,
    InvalidArgument,
    ItemsFailed,
    RequestRejected,
    ServiceUnavailable,
    ServiceUnreachable,
)
from reward_client.retries import AttemptFailedError, Call, delay_before_retry

ITEMS = [{"prompt": f"question {number}", "completion": str(number / 4)} for number in range(6)]
EXPECTED_REWARDS = [number / 4 for number in range(6)]
OPTIONS: dict[str, Any] = {
    # Long enough for a busy machine; tests of the deadline itself set a shorter one.
    "deadline_s": 30,
    "chunks": ChunkLimits(max_items=4),
    "retries": RetryPolicy(max_attempts=4, first_wait_s=0.005, max_wait_s=0.02, jitter_s=0.005),
}


class FailingServer(FakeServer):
    """A server that never gives a reward."""

    expected: ClassVar[type[ClientError]]
    """What a call raises."""
    deadline_s: ClassVar[float] = OPTIONS["deadline_s"]
    """The deadline of the call: a short one where the call ends only by it."""


class WithoutFaults(FakeServer):
    """Answers every request."""


class FailsThreeTimes(FakeServer):
    """Answers the first three requests by closing the connection, a 500 of a proxy, and a 503."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        match request.number:
            case 0:
                return
            case 1:
                yield response("500 Internal Server Error", b"Internal Server Error", "Content-Type: text/plain")
            case 2:
                yield problem("503 Service Unavailable", "not_ready", "Retry-After: 0")
            case _:
                yield ok(scores(request))


class SlowNetworkOnce(FakeServer):
    """The first body arrives too slowly."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("408 Request Timeout", "body_too_slow") if request.number == 0 else ok(scores(request))


class ChangesModelOnce(FakeServer):
    """A rolling update: the second request and all later ones are answered by the new model."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok(scores(request, version="old" if request.number == 0 else "new"))


class ClosesWithoutAnswer(FailingServer):
    """Reads the request and closes the connection."""

    expected = ServiceUnavailable

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        nothing: tuple[bytes, ...] = ()
        for part in nothing:
            yield part


class TruncatedResponse(FailingServer):
    """Sends fewer bytes than its Content-Length."""

    expected = ServiceUnavailable

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("200 OK", b'{"results": [', "Connection: close", length=5000)


class AlwaysOverloaded(FailingServer):
    """Answers 503 to everything."""

    expected = ServiceUnavailable

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("503 Service Unavailable", "overloaded", "Retry-After: 0")


class RetryAfterADay(FailingServer):
    """Answers 503 with a Retry-After beyond every deadline."""

    expected = ClientDeadlineExceeded

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("503 Service Unavailable", "draining", "Retry-After: 86400")


class Refuses(FailingServer):
    """Answers 422 to everything."""

    expected = RequestRejected

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("422 Unprocessable Content", "invalid_request")


class Redirects(FailingServer):
    """Redirects to another path."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("302 Found", b"", "Location: /elsewhere")


class NeverAnswers(FailingServer):
    """Reads the request and sends nothing."""

    expected = ClientDeadlineExceeded
    deadline_s = 1.5

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        await asyncio.sleep(30)
        yield b""


class SlowResponse(FailingServer):
    """Sends a byte every 0.1 seconds, so that no single read waits long."""

    expected = ClientDeadlineExceeded
    deadline_s = 1.5

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        for byte in ok(scores(request)):
            yield bytes([byte])
            await asyncio.sleep(0.1)


class ChangesModelEveryTime(FailingServer):
    """Answers every request with another model version."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok(scores(request, version=f"v{request.number}"))


class LosesItems(FailingServer):
    """Two items have an error instead of a reward."""

    expected = ItemsFailed

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        for index, item in enumerate(request.body["items"]):
            if item["completion"] in {"0.25", "1.25"}:
                error = {"type": "urn:x", "code": "sequence_too_long", "detail": "5,000 tokens; the limit is 4,096"}
                answer["results"][index] = {"index": index, "error": error}
        yield ok(answer)


class AnswersHtml(FailingServer):
    """Answers 200 with an HTML page of a proxy."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("200 OK", b"<html>Welcome</html>", "Content-Type: text/html")


class BreaksCompression(FailingServer):
    """Declares gzip and sends invalid data."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        content = gzip.compress(json.dumps(scores(request)).encode())
        yield response("200 OK", b"\0" + content[5:], "Content-Encoding: gzip")


class ChangesAnswer(FailingServer):
    """Changes one part of a valid answer."""

    expected = BadAnswer

    def __init__(self, change: Callable[[dict[str, Any]], object]) -> None:
        super().__init__()
        self.change = change

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        self.change(answer)
        yield ok(answer)


class NoSuchServer(FailingServer):
    """No process listens on the port."""

    expected = ServiceUnreachable
    deadline_s = 1.5


RECOVERING = {
    "without-faults": WithoutFaults,
    "fails-three-times": FailsThreeTimes,
    "slow-network-once": SlowNetworkOnce,
    "model-changes-once": ChangesModelOnce,
}
FAILING: dict[str, Callable[[], Any]] = {
    "closes-without-answer": ClosesWithoutAnswer,
    "truncated-response": TruncatedResponse,
    "always-overloaded": AlwaysOverloaded,
    "retry-after-a-day": RetryAfterADay,
    "refuses": Refuses,
    "redirects": Redirects,
    "never-answers": NeverAnswers,
    "slow-response": SlowResponse,
    "changes-model-every-time": ChangesModelEveryTime,
    "loses-items": LosesItems,
    "answers-html": AnswersHtml,
    "breaks-compression": BreaksCompression,
    "no-such-server": NoSuchServer,
    "drops-a-result": lambda: ChangesAnswer(lambda answer: answer["results"].pop()),
    "repeats-a-result": lambda: ChangesAnswer(lambda answer: answer["results"].append(answer["results"][0])),
    "swaps-results": lambda: ChangesAnswer(lambda answer: answer["results"].reverse()),
    "has-no-results": lambda: ChangesAnswer(lambda answer: answer.pop("results")),
    "has-no-version": lambda: ChangesAnswer(lambda answer: answer.pop("model")),
    "reward-is-nan": lambda: ChangesAnswer(lambda answer: answer["results"][0].update(reward=float("nan"))),
    "reward-is-infinite": lambda: ChangesAnswer(lambda answer: answer["results"][0].update(reward=float("inf"))),
    "reward-is-too-large": lambda: ChangesAnswer(lambda answer: answer["results"][0].update(reward=10**400)),
    "reward-is-null": lambda: ChangesAnswer(lambda answer: answer["results"][0].update(reward=None)),
    "reward-is-text": lambda: ChangesAnswer(lambda answer: answer["results"][0].update(reward="0.5")),
    "reward-is-true": lambda: ChangesAnswer(lambda answer: answer["results"][0].update(reward=True)),
    "reward-is-missing": lambda: ChangesAnswer(lambda answer: answer["results"][0].pop("reward")),
    "reward-beside-an-error": lambda: ChangesAnswer(lambda answer: answer["results"][0].update(error={})),
}


class Caller:
    """Scores the items of this file through one of the two clients."""

    names: ClassVar = ["sync", "async"]

    def __init__(self, name: str, url: str, **options: Any) -> None:
        self.name, self.url, self.options = name, url, OPTIONS | options

    def score(self) -> list[float]:
        if self.name == "sync":
            with RewardClient(self.url, **self.options) as client:
                return [item.known_reward for item in client.score_items(ITEMS)]
        return asyncio.run(self._score())

    async def _score(self) -> list[float]:
        async with AsyncRewardClient(self.url, **self.options) as client:
            return [item.known_reward for item in await client.score_items(ITEMS)]


@pytest.mark.parametrize("name", Caller.names)
@pytest.mark.parametrize("make_server", RECOVERING.values(), ids=RECOVERING.keys())
def test_temporary_failures_are_hidden(make_server: Callable[[], FakeServer], name: str) -> None:
    """Failures that end within the attempts and the deadline are hidden; the rewards are in the order of the items."""
    with running(make_server()) as server:
        rewards = Caller(name, server.url).score()

    assert rewards == EXPECTED_REWARDS


@pytest.mark.parametrize("name", Caller.names)
@pytest.mark.parametrize("make_server", FAILING.values(), ids=FAILING.keys())
def test_lasting_failures_raise_their_exception_in_time(make_server: Callable[[], FailingServer], name: str) -> None:
    """No failure yields a reward: each raises its exception within the deadline."""
    with running(make_server()) as server:
        url = f"http://127.0.0.1:{unused_port()}" if isinstance(server, NoSuchServer) else server.url
        started = time.monotonic()

        with pytest.raises(ClientError) as caught:
            Caller(name, url, deadline_s=server.deadline_s).score()

        assert time.monotonic() - started < server.deadline_s + 1
        assert type(caught.value) is server.expected


class Restarting(FakeServer):
    """Answers the first request; then a proxy answers 404 for it, without a problem document."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if 0 < request.number < 4:
            yield response("404 Not Found", b"Path not found", "Content-Type: text/plain")
        else:
            yield ok(scores(request))


class AnotherServer(FakeServer):
    """A server that is no reward service."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("404 Not Found", b"<html>", "Content-Type: text/html")


class WithoutTls(FakeServer):
    """Answers what is no HTTP as HTTP servers do."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read(5)
            writer.write(response("400 Bad Request", b""))
            await writer.drain()
            writer.close()


class NoSuchRoute(FakeServer):
    """Answers 404 with the problem document of the service."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("404 Not Found", "not_found")


def test_a_404_of_a_proxy_is_retried() -> None:
    """A 404 without a problem document is not the service's; it is retried until the service answers."""
    with running(Restarting()) as server, RewardClient(server.url, **OPTIONS) as client:
        assert client.score(["q"], ["1"]) == [1.0]
        assert client.score(["q"], ["2"]) == [2.0]

    assert len(server.requests) == 5


def test_a_404_of_the_service_is_final() -> None:
    """A 404 with a problem document is raised at once."""
    with (
        running(NoSuchRoute()) as server,
        RewardClient(server.url, **OPTIONS) as client,
        pytest.raises(RequestRejected, match=f"{server.url} answered 404 not_found: a detail"),
    ):
        client.score(["q"], ["1"])

    assert len(server.requests) == 1


def test_a_server_that_is_no_reward_service_is_given_up() -> None:
    """A server that has only answered 404 is given up after wait_for_start_s, and not at the deadline."""
    options = OPTIONS | {"wait_for_start_s": 0.3}
    with (
        running(AnotherServer()) as server,
        RewardClient(server.url, **options) as client,
        pytest.raises(ServiceUnreachable, match=r"404 without a problem document.*check the URL"),
    ):
        client.score(["q"], ["1"])


NEVER_STARTED = {
    "refused": ("http://127.0.0.1:{port}", "connection refused"),
    "no-such-name": ("http://no-such-name.invalid:{port}", "the name of the host does not resolve"),
}


@pytest.mark.parametrize("name", Caller.names)
@pytest.mark.parametrize(("url", "reason"), NEVER_STARTED.values(), ids=NEVER_STARTED.keys())
def test_a_service_that_never_answered_is_given_up(
    name: str, url: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried for wait_for_start_s, whatever max_attempts is; the exception has URL, reason and attempts."""
    monkeypatch.setattr(socket, "getaddrinfo", resolve_without_network)
    address = url.format(port=unused_port())
    started = time.monotonic()

    with pytest.raises(
        ServiceUnreachable, match=f"^No answer from {address}: {reason} .last of [0-9]+ tries."
    ) as caught:
        Caller(name, address, deadline_s=60, wait_for_start_s=0.5).score()

    assert 0.5 <= time.monotonic() - started < 10
    assert (caught.value.url, caught.value.reason) == (address, reason)
    assert caught.value.attempts > OPTIONS["retries"].max_attempts
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  (our own bytes)
    assert (str(copy), copy.url, copy.reason) == (str(caught.value), address, reason)


def resolve_without_network(host: Any, *arguments: Any, _resolve: Any = socket.getaddrinfo, **options: Any) -> Any:
    """Resolve addresses of this machine only; a name fails at once, also where the name server does not answer."""
    if ".invalid" in str(host):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return _resolve(host, *arguments, **options)


def test_a_service_that_never_answered_is_given_up_after_half_a_minute() -> None:
    """By default attempts at a service that has never answered end between 20 and 40 seconds."""
    policy, call = RetryPolicy(), Call("u", 600.0, None, lambda: False)
    failure = AttemptFailedError("connection refused", not_started=True)
    delays = [delay_before_retry(failure, policy, attempt, call) for attempt in range(1, policy.max_attempts)]

    assert 20 < sum(delays) < 40
    assert call.start_s == 30


def test_a_service_that_answered_before_is_retried_until_it_is_back() -> None:
    """After a first answer a refused connection is retried for longer than wait_for_start_s."""
    options = OPTIONS | {"wait_for_start_s": 0.0}
    policy = RetryPolicy(max_attempts=400, first_wait_s=0.02, max_wait_s=0.02, jitter_s=0.0)
    with RewardClient("http://127.0.0.1:9", **options | {"retries": policy}) as client:
        with running(FakeServer()) as server:
            client._client.url = server.url
            assert client.score(["q"], ["1"]) == [1.0]
        client._client.url = f"http://127.0.0.1:{unused_port()}"
        waiting = threading.Thread(target=lambda: results.append(client.score(["q"], ["2"])), daemon=True)
        results: list[list[float]] = []
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        with running(FakeServer()) as server:
            client._client.url = server.url
            waiting.join(10)

    assert results == [[2.0]]


@pytest.mark.parametrize(
    ("make_server", "message"),
    [
        (
            NeverAnswers,
            "No answer from {url} within 0.4 s: the first attempt still waits for a connection or a response",
        ),
        (AlwaysOverloaded, "No answer from {url} within 0.4 s: 503 overloaded .last of [0-9]+ tries."),
        (ClosesWithoutAnswer, "No answer from {url} within 0.4 s: the connection was closed before the response was"),
    ],
    ids=["silent", "overloaded", "closing"],
)
def test_a_deadline_names_the_service_and_the_last_cause(make_server: Callable[[], FakeServer], message: str) -> None:
    """The exception of a deadline says who was asked, and what happened last."""
    policy = RetryPolicy(max_attempts=10_000, first_wait_s=0.01, max_wait_s=0.01, jitter_s=0.0)
    with (
        running(make_server()) as server,
        RewardClient(server.url, deadline_s=0.4, retries=policy) as client,
        pytest.raises(ClientDeadlineExceeded, match=message.format(url=server.url)) as caught,
    ):
        client.score(["q"], ["1"])

    assert caught.value.url == server.url


def test_a_bad_answer_names_the_service() -> None:
    """The exception for an answer that violates the protocol says who sent it."""
    with (
        running(AnswersHtml()) as server,
        RewardClient(server.url, **OPTIONS) as client,
        pytest.raises(BadAnswer, match=f"is not JSON .from {server.url}.") as caught,
    ):
        client.model()

    assert caught.value.url == server.url


def test_tls_at_a_port_without_it_is_told() -> None:
    """An https:// URL of a service that speaks HTTP says so."""
    with running(WithoutTls()) as server:
        url = server.url.replace("http://", "https://")
        with (
            RewardClient(url, **OPTIONS) as client,
            pytest.raises(ServiceUnreachable, match="the service may speak http:// only"),
        ):
            client.score(["q"], ["1"])


def test_waiting_until_ready_says_why_it_ended() -> None:
    """The exception names the last answer of the readiness probe."""
    with (
        running(AlwaysOverloaded()) as server,
        RewardClient(server.url) as client,
        pytest.raises(ClientDeadlineExceeded, match=f"{server.url} within 0.4 s: 503 overloaded"),
    ):
        client.wait_until_ready(0.4)


def test_each_retry_is_one_record(caplog: pytest.LogCaptureFixture) -> None:
    """A retry is one record of the logger reward_client, with service, reason and delay."""
    caplog.set_level(logging.INFO)
    with running(FailsThreeTimes()) as server, RewardClient(server.url, **OPTIONS) as client:
        assert client.score(["q"], ["1"]) == [1.0]

    records = [(record.name, record.levelname) for record in caplog.records if record.name != "httpx2"]
    assert records == [("reward_client", "WARNING"), ("reward_client", "WARNING"), ("reward_client", "INFO")]
    first, second, third = (record.getMessage() for record in caplog.records if record.name == "reward_client")
    assert re.fullmatch(
        rf"{server.url}: attempt 1 failed: the connection was closed before the response was complete; "
        r"next attempt in 0\.\d\d s",
        first,
    )
    assert "attempt 2 failed: 500 Internal Server Error without a problem document; next attempt in" in second
    assert "attempt 3 failed: 503 not_ready; next attempt in" in third


class QuotaUsedUp(FakeServer):
    """Refuses the first two requests for the quota of their key, with and without Retry-After."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.number < 2:
            yield problem("429 Too Many Requests", "quota_exceeded", *["Retry-After: 0"][request.number :])
        else:
            yield ok(scores(request))


def test_a_quota_is_waited_for() -> None:
    """A 429 is retried, after its Retry-After if it has one."""
    with running(QuotaUsedUp()) as server, RewardClient(server.url, **OPTIONS) as client:
        assert client.score(["q"], ["1"]) == [1.0]
        assert len(server.requests) == 3


def test_an_api_key_is_sent_as_a_bearer_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument beats the environment, an Authorization among the headers beats the environment too."""
    monkeypatch.setenv("REWARD_API_KEY", "of-environment")
    with running(FakeServer()) as server:
        for options, sent in (
            ({}, "Bearer of-environment"),
            ({"api_key": "given"}, "Bearer given"),
            ({"headers": {"authorization": "Basic eA=="}}, "Basic eA=="),
        ):
            with RewardClient(server.url, **OPTIONS, **options) as client:
                assert client.score(["q"], ["1"]) == [1.0]
            assert server.requests[-1].headers["authorization"] == sent
    with pytest.raises(InvalidArgument, match="exclude each other"):
        RewardClient(server.url, api_key="given", headers={"Authorization": "Basic eA=="})
    wrong: Any
    for wrong in ("", "a b", "schlüssel", 7):
        with pytest.raises(InvalidArgument, match="visible ASCII"):
            RewardClient(server.url, api_key=wrong)


def test_retries_are_silent_by_default() -> None:
    """A program that does not set logging up gets rewards and nothing on standard error."""
    with running(FailsThreeTimes()) as server:
        program = (
            "from reward_client import RewardClient, RetryPolicy\n"
            "policy = RetryPolicy(first_wait_s=0.01, jitter_s=0.01)\n"
            f"print(RewardClient({server.url!r}, retries=policy).score(['q'], ['1']))"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert (done.stdout.strip(), done.stderr) == ("[1.0]", "")


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
