"""The generator against a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from misbehaving_server import FakeServer, Request, ok, problem, response, running

from loadtest.generator import send_all
from loadtest.wire import UnexpectedAnswer, VllmWire


def test_replies_stand_in_the_order_of_the_requests_and_connections_are_kept() -> None:
    """Whatever answers first, replies are those of their requests, and only so many connections are used."""

    class Counting(FakeServer):
        """Rewards are prompt numbers; counts its connections."""

        connections = 0

        async def serve(self, reader, writer) -> None:
            self.connections += 1
            await super().serve(reader, writer)

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield ok({"results": [{"reward": float(item["prompt"])} for item in request.body["items"]]})

    bodies = [json.dumps({"items": [{"prompt": str(number)}]}).encode() for number in range(40)]
    with running(Counting()) as world:
        run = send_all(world.url, bodies, num_connections=4)

    assert run.rewards == list(range(40))
    assert world.connections == 4
    assert 0 < run.latency_s(0.5) <= run.latency_s(0.95) <= run.wall_s


def test_a_connection_that_is_given_up_is_opened_anew() -> None:
    """A server that says it closes, as a proxy does on its way out, loses no request."""

    class Leaving(FakeServer):
        """Closes each connection behind its second answer."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            content = json.dumps({"results": [{"reward": float(request.body["items"][0]["prompt"])}]}).encode()
            yield response("200 OK", content, *["Connection: close"] * (request.number % 2))

    bodies = [json.dumps({"items": [{"prompt": str(number)}]}).encode() for number in range(9)]
    with running(Leaving()) as world:
        run = send_all(world.url, bodies, num_connections=1)

    assert run.rewards == list(range(9))


@pytest.mark.parametrize(
    "said",
    [
        problem("503 Service Unavailable", "overloaded"),
        ok({"results": [{"error": {}}]}),
        response("200 OK", b"", "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b""),
    ],
    ids=["not-a-200", "item-error", "no-length"],
)
def test_anything_but_rewards_ends_the_measurement(said: bytes) -> None:
    """A fast refusal must never count as fast scoring."""

    class Saying(FakeServer):
        """Says one thing."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            yield said

    with running(Saying()) as world, pytest.raises(UnexpectedAnswer):
        _ = send_all(world.url, [b'{"items": []}'], num_connections=1).rewards


def test_a_wire_format_has_its_own_path_and_reading() -> None:
    """Requests go where the format says, and its answers are read as it says."""

    class Classifier(FakeServer):
        """Says where it was asked."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            asked = {"/classify": 1.5}[request.path]
            yield ok({"data": [{"index": 0, "probs": [asked]}]})

    with running(Classifier()) as world:
        run = send_all(world.url, [b'{"input": ["a"]}'], num_connections=1, wire=VllmWire(tokenizer=None))

    assert run.rewards == [1.5]
