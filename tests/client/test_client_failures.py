"""Whatever the server does, a call returns the rewards that the service computed, or raises the right exception."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
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
    ItemsFailed,
    RequestRejected,
    ServiceUnavailable,
    ServiceUnreachable,
)

ITEMS = [{"prompt": f"question {number}", "completion": str(number / 4)} for number in range(6)]
EXPECTED_REWARDS = [number / 4 for number in range(6)]
OPTIONS: dict[str, Any] = {
    "deadline_s": 1.5,
    "chunks": ChunkLimits(max_items=4),
    "retries": RetryPolicy(max_attempts=4, first_wait_s=0.005, max_wait_s=0.02, jitter_s=0.005),
}


class FailingServer(FakeServer):
    """A server that never gives a reward."""

    expected: ClassVar[type[ClientError]]
    """What a call raises."""


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

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        await asyncio.sleep(30)
        yield b""


class SlowResponse(FailingServer):
    """Sends a byte every 0.1 seconds, so that no single read waits long."""

    expected = ClientDeadlineExceeded

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


RECOVERING = {
    "without-faults": WithoutFaults,
    "fails-three-times": FailsThreeTimes,
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

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    def score(self) -> list[float]:
        if self.name == "sync":
            with RewardClient(self.url, **OPTIONS) as client:
                return [item.reward for item in client.score_items(ITEMS)]
        return asyncio.run(self._score())

    async def _score(self) -> list[float]:
        async with AsyncRewardClient(self.url, **OPTIONS) as client:
            return [item.reward for item in await client.score_items(ITEMS)]


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
            Caller(name, url).score()

        assert time.monotonic() - started < OPTIONS["deadline_s"] + 1
        assert type(caught.value) is server.expected


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
