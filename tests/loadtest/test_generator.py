"""The generator sends requests over real sockets and measures rewards only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from misbehaving_server import CountingServer, FakeServer, Request, ok, problem, response, running

from loadtest.generator import send_all, send_for
from loadtest.wire import UnexpectedAnswer, VllmWire


def test_replies_are_in_the_order_of_the_requests_and_connections_are_reused() -> None:
    """Replies are assigned to their requests, and no more than the given number of connections is used."""

    class Counting(CountingServer):
        """Rewards are prompt numbers."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield ok({"results": [{"reward": float(item["prompt"])} for item in request.body["items"]]})

    bodies = [json.dumps({"items": [{"prompt": str(number)}]}).encode() for number in range(40)]
    with running(Counting()) as world:
        run = send_all(world.url, bodies, num_connections=4)

    assert run.rewards == list(range(40))
    assert world.connections == 4
    assert 0 < run.latency_s(0.5) <= run.latency_s(0.95) <= run.wall_s


def test_for_some_time_the_requests_are_sent_again_and_again() -> None:
    """More connections than bodies are used, each body is sent several times, and every sent request has its reply."""

    class Counting(CountingServer):
        """Rewards are prompt numbers."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield ok({"results": [{"reward": float(item["prompt"])} for item in request.body["items"]]})

    bodies = [json.dumps({"items": [{"prompt": str(number)}]}).encode() for number in range(3)]
    with running(Counting()) as world:
        run = send_for(world.url, bodies, num_connections=4, seconds=0.3)

    assert world.connections == 4
    assert len(run.rewards) > 6
    assert run.rewards == [float(number % 3) for number in range(len(run.rewards))]
    assert run.wall_s >= 0.3


def test_a_closed_connection_is_opened_again() -> None:
    """No request is lost where the server announces that it closes the connection."""

    class Leaving(FakeServer):
        """Closes each connection after its second response."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            content = json.dumps({"results": [{"reward": float(request.body["items"][0]["prompt"])}]}).encode()
            yield response("200 OK", content, *["Connection: close"] * (request.number % 2))

    bodies = [json.dumps({"items": [{"prompt": str(number)}]}).encode() for number in range(9)]
    with running(Leaving()) as world:
        run = send_all(world.url, bodies, num_connections=1)

    assert run.rewards == list(range(9))


@pytest.mark.parametrize(
    "given",
    [
        problem("503 Service Unavailable", "overloaded"),
        ok({"results": [{"error": {}}]}),
        response("200 OK", b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""),
    ],
    ids=["not-a-200", "item-error", "no-length"],
)
def test_a_response_without_rewards_ends_the_measurement(given: bytes) -> None:
    """A fast refusal does not count as fast scoring."""

    class Fixed(FakeServer):
        """Returns the same response to every request."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield given

    with running(Fixed()) as world, pytest.raises(UnexpectedAnswer):
        _ = send_all(world.url, [b'{"items": []}'], num_connections=1).rewards


def test_a_wire_format_has_its_own_path_and_reading() -> None:
    """Requests go to the format's path, and responses are parsed by the format."""

    class Classifier(FakeServer):
        """Returns a reward for the path of the request."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            reward = {"/classify": 1.5}[request.path]
            yield ok({"data": [{"index": 0, "probs": [reward]}]})

    with running(Classifier()) as world:
        run = send_all(world.url, [b'{"input": ["a"]}'], num_connections=1, wire=VllmWire(tokenizer=None))

    assert run.rewards == [1.5]
