"""Bytes that no client sends: framing that two parsers could read differently, floods, and bodies that break off."""

from __future__ import annotations

import json

import pytest
from mutations import CANARY
from raw_http import RawConnection
from serving import RunningServer

from service.engines.oracle import oracle_reward_of_text

BODY = b'{"items":[{"text":"a"}]}'
SCORE = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKED_BODY = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
HIDDEN = b"GET /hidden-request HTTP/1.1\r\nHost: x\r\n\r\n"
"""A request inside the body of another one; a parser that ends the body early would answer it with 404."""

HIDING = {
    "length-and-chunked": SCORE + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
    "chunked-and-length": SCORE + CHUNKED + b"Content-Length: %d\r\n\r\n" % (5 + len(HIDDEN)) + b"0\r\n\r\n" + HIDDEN,
    "two-lengths": SCORE + b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "list-of-lengths": SCORE + b"Content-Length: 0, %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "length-with-sign": SCORE + b"Content-Length: +0\r\n\r\n" + HIDDEN,
    "length-in-hexadecimal": SCORE + b"Content-Length: 0x0\r\n\r\n" + HIDDEN,
    "negative-length": SCORE + b"Content-Length: -1\r\n\r\n" + HIDDEN,
    "length-beyond-64-bits": SCORE + b"Content-Length: 18446744073709551616\r\n\r\n" + HIDDEN,
    "space-before-colon": SCORE + b"Content-Length : %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "folded-header": SCORE + b"X: a\r\n Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN,
    "unknown-coding": SCORE + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
    "coding-with-tab": SCORE + b"Transfer-Encoding:\tchunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
    "two-codings": SCORE + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
    "coding-of-http-1.0": SCORE.replace(b"1.1", b"1.0") + CHUNKED + LENGTH + b"\r\n" + CHUNKED_BODY + HIDDEN,
    "chunk-with-sign": SCORE + CHUNKED + b"\r\n+5\r\nabcde\r\n0\r\n\r\n" + HIDDEN,
    "chunk-with-underscore": SCORE + CHUNKED + b"\r\n0_5\r\nabcde\r\n0\r\n\r\n" + HIDDEN,
    "chunk-beyond-64-bits": SCORE + CHUNKED + b"\r\n1ffffffffffffffff\r\n" + HIDDEN,
    "chunk-without-size": SCORE + CHUNKED + b"\r\n;a=b\r\n0\r\n\r\n" + HIDDEN,
    "chunk-longer-than-its-size": SCORE + CHUNKED + b"\r\n1\r\nabcdef\r\n0\r\n\r\n" + HIDDEN,
    "line-feeds-alone": SCORE.replace(b"\r\n", b"\n") + b"Content-Length: 0\n\n" + HIDDEN,
    "carriage-return-in-header": SCORE + b"X: a\rContent-Length: 0\r\n\r\n" + HIDDEN,
    "nul-in-header": SCORE + b"X: a\x00b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
}
"""The first answer may be an error; what counts is that no second one follows, since there is no second request."""

READ_AS_TWO = {("ray", "length-beyond-64-bits"), ("ray", "line-feeds-alone")}
"""HAProxy 2.8 reads 2**64, and no other length, as 0, and takes a line feed alone for the end of a line, as RFC 9112
(2.2) allows; what follows is then a request of its own. It alone decides where requests end, and both are answered to
the one who sent them, so nothing is gained by it."""

READ_AS_CHUNKED = {("ray", "coding-of-http-1.0")}
"""HAProxy takes the coding, drops the length, and closes the connection, as RFC 9112 (6.1) allows."""

BROKEN = {
    "nothing": b"",
    "empty-lines": b"\r\n" * 2000,
    "zeros": b"\x00" * 5000,
    "random-bytes": bytes(range(256)) * 20,
    "client-hello-of-tls": bytes.fromhex("160301007a010000760303") + b"\x11" * 111,
    "preface-of-http-2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "http-0.9": b"GET /livez\r\n",
    "unknown-version": b"GET /livez HTTP/9.9\r\nHost: x\r\n\r\n",
    "unknown-method": b"A" * 300 + b" / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no-host": b"GET /livez HTTP/1.1\r\n\r\n",
    "long-path": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "long-header": SCORE + b"X: " + b"a" * 200_000 + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "many-headers": SCORE + b"".join(b"X-%d: a\r\n" % n for n in range(20_000)) + LENGTH + b"\r\n" + BODY,
    "header-that-never-ends": SCORE + b"X: a\r\n" * 20_000,
    "header-value-that-never-ends": SCORE + b"X: " + b"a" * 3_000_000,
    "proxy-form": b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: x\r\n\r\n",
    "connect": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n",
    "upgrade": b"GET /v1/score HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    "body-cut-off": SCORE + b"Content-Length: 5000\r\n\r\n" + BODY,
    "chunk-cut-off": SCORE + CHUNKED + b"\r\n1000\r\n" + BODY,
    "chunks-of-one-byte": SCORE + CHUNKED + b"\r\n" + b"1\r\n \r\n" * 60_000 + CHUNKED_BODY,
    "chunk-extensions": SCORE + CHUNKED + b"\r\n1;" + b"x" * 60_000 + b"\r\n \r\n" + CHUNKED_BODY,
    "many-trailers": SCORE + CHUNKED + b"\r\n0\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
    "pipelined": (SCORE + LENGTH + b"\r\n" + BODY) * 200,
}


def good_reward(server: RunningServer) -> float:
    """The reward of a good request on a new connection, which has to come within 5 s."""
    body = json.dumps({"items": [{"prompt": "a ", "completion": "good one"}]}).encode()
    connection = RawConnection(server.url, timeout_s=5.0)
    answer = connection.ask(SCORE + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    connection.close()
    assert answer.status == 200
    return float(json.loads(answer.body)["results"][0]["reward"])


@pytest.mark.parametrize("name", HIDING)
def test_no_request_hides_in_another(name: str, oracle_server: RunningServer) -> None:
    """Where the end of a body is ambiguous, what follows is never taken for a request of its own."""
    answers = RawConnection(oracle_server.url, timeout_s=1.0).send(HIDING[name])

    case = (oracle_server.runtime, name)
    assert not any(answer.is_fault for answer in answers)
    assert len(answers) <= (2 if case in READ_AS_TWO else 1)
    if oracle_server.runtime == "local":
        assert [answer.status for answer in answers] == [400]
    assert case in READ_AS_CHUNKED or not any(answer.status == 200 for answer in answers)
    assert good_reward(oracle_server) == oracle_reward_of_text("a ", "good one")


@pytest.mark.parametrize(
    "name",
    [
        "long-path",
        "long-header",
        "many-headers",
        "header-that-never-ends",
        "header-value-that-never-ends",
        "many-trailers",
    ],
)
def test_large_heads_are_refused(name: str, oracle_server: RunningServer) -> None:
    """A head of more than a few dozen kilobytes, or headers, is refused, also one that never ends."""
    answers = RawConnection(oracle_server.url, timeout_s=5.0).send(BROKEN[name])

    assert [answer.status for answer in answers] in ([400], [414], [431], [])
    assert good_reward(oracle_server) == oracle_reward_of_text("a ", "good one")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_bytes_harm_nobody(name: str, oracle_server: RunningServer) -> None:
    """Whatever bytes arrive, the answer is none or a status that is meant, and the next good request is answered."""
    answers = RawConnection(oracle_server.url, timeout_s=0.5).send(BROKEN[name])
    of_half_closed = RawConnection(oracle_server.url, timeout_s=0.5).send(BROKEN[name], ends=True)

    assert not any(answer.is_fault for answer in (*answers, *of_half_closed))
    assert not any(CANARY.encode() in answer.body for answer in answers)
    assert good_reward(oracle_server) == oracle_reward_of_text("a ", "good one")
