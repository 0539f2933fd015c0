"""In every bad world a call ends with the rewards that the service gave, or with an exception that says why not."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import pytest
from misbehaving_server import Request, World, ok, problem, response, running, scores
from reward_client import AsyncRewardClient, ChunkLimits, RetryPolicy, RewardClient
from reward_client.errors import (
    BadAnswer,
    ClientDeadlineExceeded,
    ClientError,
    ItemsFailed,
    RequestRejected,
    ServiceUnavailable,
)

ITEMS = [{"prompt": f"question {number}", "completion": str(number / 4)} for number in range(6)]
TRUE_REWARDS = [number / 4 for number in range(6)]
PATIENCE: dict[str, Any] = {
    "deadline_s": 1.5,
    "chunks": ChunkLimits(max_items=4),
    "retries": RetryPolicy(max_attempts=4, first_wait_s=0.005, max_wait_s=0.02, jitter_s=0.005),
}


class BadWorld(World):
    """A service that never gives a reward."""

    expected: ClassVar[type[ClientError]]
    """What a call raises."""


class Honest(World):
    """Everything works."""


class BreaksForAWhile(World):
    """The first three requests meet a closed connection, a bare 500 of a proxy and a 503."""

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


class ChangesModelOnce(World):
    """A rolling update passes through: the second request is answered by the new model, as all later ones."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok(scores(request, version="old" if request.number == 0 else "new"))


class ClosesWithoutAnswer(BadWorld):
    """Takes the request and hangs up."""

    expected = ServiceUnavailable

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        nothing: tuple[bytes, ...] = ()
        for part in nothing:
            yield part


class HangsUpHalfway(BadWorld):
    """Promises more bytes than it sends."""

    expected = ServiceUnavailable

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("200 OK", b'{"results": [', "Connection: close", length=5000)


class AlwaysOverloaded(BadWorld):
    """Answers 503 to everything."""

    expected = ServiceUnavailable

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("503 Service Unavailable", "overloaded", "Retry-After: 0")


class AsksToComeBackTomorrow(BadWorld):
    """Answers 503 with a Retry-After beyond every deadline."""

    expected = ClientDeadlineExceeded

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("503 Service Unavailable", "draining", "Retry-After: 86400")


class Refuses(BadWorld):
    """Answers 422, once and for all."""

    expected = RequestRejected

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("422 Unprocessable Content", "invalid_request")


class Redirects(BadWorld):
    """Sends us elsewhere."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("302 Found", b"", "Location: /elsewhere")


class NeverAnswers(BadWorld):
    """Takes the request and falls silent."""

    expected = ClientDeadlineExceeded

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        await asyncio.sleep(30)
        yield b""


class Drips(BadWorld):
    """Sends a byte now and then, so that no single read ever waits long."""

    expected = ClientDeadlineExceeded

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        for byte in ok(scores(request)):
            yield bytes([byte])
            await asyncio.sleep(0.1)


class KeepsChangingModels(BadWorld):
    """No two requests are answered by the same model."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok(scores(request, version=f"v{request.number}"))


class LosesItems(BadWorld):
    """Two items have an error instead of a reward."""

    expected = ItemsFailed

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        for place, item in enumerate(request.body["items"]):
            if item["completion"] in {"0.25", "1.25"}:
                error = {"type": "urn:x", "code": "sequence_too_long", "detail": "5,000 tokens; the limit is 4,096"}
                answer["results"][place] = {"index": place, "error": error}
        yield ok(answer)


class SaysNotJson(BadWorld):
    """Answers 200 with a page of a proxy."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield response("200 OK", b"<html>Welcome</html>", "Content-Type: text/html")


class BreaksCompression(BadWorld):
    """Announces gzip and sends half of it."""

    expected = BadAnswer

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        content = gzip.compress(json.dumps(scores(request)).encode())
        yield response("200 OK", b"\0" + content[5:], "Content-Encoding: gzip")


class Tampers(BadWorld):
    """An honest answer with one thing changed."""

    expected = BadAnswer

    def __init__(self, change: Callable[[dict[str, Any]], object]) -> None:
        super().__init__()
        self.change = change

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        self.change(answer)
        yield ok(answer)


class NoSuchServer(BadWorld):
    """Nobody listens."""

    expected = ServiceUnavailable


GOOD_WORLDS = {"honest": Honest, "breaks-for-a-while": BreaksForAWhile, "model-changes-once": ChangesModelOnce}
BAD_WORLDS: dict[str, Callable[[], Any]] = {
    "closes-without-answer": ClosesWithoutAnswer,
    "hangs-up-halfway": HangsUpHalfway,
    "always-overloaded": AlwaysOverloaded,
    "asks-to-come-back-tomorrow": AsksToComeBackTomorrow,
    "refuses": Refuses,
    "redirects": Redirects,
    "never-answers": NeverAnswers,
    "drips": Drips,
    "keeps-changing-models": KeepsChangingModels,
    "loses-items": LosesItems,
    "says-not-json": SaysNotJson,
    "breaks-compression": BreaksCompression,
    "no-such-server": NoSuchServer,
    "drops-a-result": lambda: Tampers(lambda answer: answer["results"].pop()),
    "repeats-a-result": lambda: Tampers(lambda answer: answer["results"].append(answer["results"][0])),
    "swaps-results": lambda: Tampers(lambda answer: answer["results"].reverse()),
    "has-no-results": lambda: Tampers(lambda answer: answer.pop("results")),
    "has-no-version": lambda: Tampers(lambda answer: answer.pop("model")),
    "reward-is-nan": lambda: Tampers(lambda answer: answer["results"][0].update(reward=float("nan"))),
    "reward-is-infinite": lambda: Tampers(lambda answer: answer["results"][0].update(reward=float("inf"))),
    "reward-is-too-large": lambda: Tampers(lambda answer: answer["results"][0].update(reward=10**400)),
    "reward-is-null": lambda: Tampers(lambda answer: answer["results"][0].update(reward=None)),
    "reward-is-text": lambda: Tampers(lambda answer: answer["results"][0].update(reward="0.5")),
    "reward-is-true": lambda: Tampers(lambda answer: answer["results"][0].update(reward=True)),
    "reward-is-missing": lambda: Tampers(lambda answer: answer["results"][0].pop("reward")),
    "reward-beside-an-error": lambda: Tampers(lambda answer: answer["results"][0].update(error={})),
}


class Caller:
    """Scores the items of this file through one of the two clients."""

    names: ClassVar = ["sync", "async"]

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url

    def score(self) -> list[float]:
        if self.name == "sync":
            with RewardClient(self.url, **PATIENCE) as client:
                return [item.reward for item in client.score_items(ITEMS)]
        return asyncio.run(self._score())

    async def _score(self) -> list[float]:
        async with AsyncRewardClient(self.url, **PATIENCE) as client:
            return [item.reward for item in await client.score_items(ITEMS)]


@pytest.mark.parametrize("name", Caller.names)
@pytest.mark.parametrize("make_world", GOOD_WORLDS.values(), ids=GOOD_WORLDS.keys())
def test_passing_trouble_ends_with_true_rewards(make_world: Callable[[], World], name: str) -> None:
    """The caller does not see what passes within tries and deadline; the rewards come in the order of the items."""
    with running(make_world()) as world:
        rewards = Caller(name, world.url).score()

    assert rewards == TRUE_REWARDS


@pytest.mark.parametrize("name", Caller.names)
@pytest.mark.parametrize("make_world", BAD_WORLDS.values(), ids=BAD_WORLDS.keys())
def test_lasting_trouble_ends_with_its_exception_in_time(make_world: Callable[[], BadWorld], name: str) -> None:
    """No bad world yields a number: each ends, within the deadline, with the exception that names it."""
    with running(make_world()) as world:
        url = f"http://127.0.0.1:{unused_port()}" if isinstance(world, NoSuchServer) else world.url
        started = time.monotonic()

        with pytest.raises(ClientError) as caught:
            Caller(name, url).score()

        assert time.monotonic() - started < PATIENCE["deadline_s"] + 1
        assert type(caught.value) is world.expected


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
