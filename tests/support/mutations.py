"""Mutated HTTP requests: valid ones of every route, broken in body, structure, encoding, headers or framing.

All follows from the seed of the random generator, so a case can be made again from its number.
"""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from backports import zstd

CANARY = "canary-text-of-a-user"
"""A text in every body, which no answer, log or metric may repeat."""

TEXT = f"a {CANARY} with <|im_end|> and \U0001f600"
TURNS = [{"role": "user", "content": TEXT}]
BODIES: dict[str, Any] = {
    "/v1/score": {"items": [{"prompt": TEXT, "completion": TEXT, "id": 1}, {"text": TEXT}], "diagnostics": "full"},
    "/v1/compare": {"prompt": TURNS, "completions": [TEXT, "b"], "timeout_ms": 9000},
    "/get_reward": {"query": [TEXT], "prompts": [TEXT]},
    "/classify": {"input": TEXT},
    "/pooling": {"input": [TEXT, "b"]},
    "/score": {"text_1": TEXT, "text_2": [TEXT, "b"]},
    "/v1/score/evaluation": {"messages": [TEXT], "model": "m"},
    "/rm": {"prompt": TURNS, "response": TEXT},
    "/v1/embeddings": {"input": TEXT},
    "/predict": {"inputs": [[TEXT, "b"]], "raw_scores": True},
    "/v2/models/oracle/infer": {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [TEXT]}],
    },
}
READ_PATHS = ("/v1/model", "/v1/monitor", "/metrics", "/openapi.json", "/livez", "/readyz", "/v2", "/info", "/nothing")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1e308, -(2**63), 2**63, 10**30, 0.5, "", "a", "\x00", "\u202e", "\ud800", "a" * 5000, [], {},
    [[]], [None], [{}], {"": ""}, ["a"] * 300, [0] * 300, [-1], [2**31], {"role": "user"}, TURNS, "NaN", "1", "marker",
)  # fmt: skip
HEADERS: tuple[tuple[str, str], ...] = (
    ("Content-Type", "text/plain"), ("Content-Type", "application/json; charset=utf-16"), ("Content-Type", "\xff"),
    ("Content-Type", "multipart/form-data; boundary=x"), ("Content-Encoding", "br"), ("Content-Encoding", "gzip"),
    ("Content-Encoding", "zstd"),
    ("X-Request-Id", "a" * 200), ("X-Request-Id", "\xff\xfe"), ("X-Run-Id", "r" * 300), ("X-Run-Id", "../../etc"),
    ("Accept", "text/html"), ("Authorization", "Bearer x"), ("Authorization", "Basic %%%"), ("Host", ""),
    ("Expect", "100-continue"), ("X-Request-Timeout-Seconds", "-1"), ("X-Request-Disconnect-Disabled", "?1"),
    ("Serve_Multiplexed_Model_Id", "other"), ("Cookie", "a=" + "b" * 4000), ("Range", "bytes=0-"),
    ("X-HTTP-Method-Override", "DELETE"), ("Transfer-Encoding", "identity"), ("Connection", "Upgrade"),
    ("Upgrade", "websocket"), ("traceparent", "00-" + "0" * 32), ("Content-Length", "007"),
)  # fmt: skip


def mutated_requests(seed: int, count: int) -> Iterator[bytes]:
    """Yield ``count`` requests as bytes; each is framed so that a server knows where it ends, or ends the stream."""
    generator = random.Random(seed)
    for _ in range(count):
        yield mutated_request(generator)


def mutated_body(generator: random.Random, path: str) -> bytes:
    """A body of a scoring route with one to three changes."""
    value = json.loads(json.dumps(BODIES[path]))
    for _ in range(generator.randint(1, 3)):
        value = _change_value(generator, value)
    try:
        text = json.dumps(value, ensure_ascii=generator.random() < 0.5)
        body = text.encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        body = b"{}"
    return generator.choice(_BODY_CHANGES)(generator, body)


def mutated_request(generator: random.Random) -> bytes:
    """One request; its body fits its declared length unless the change is that it does not."""
    if generator.random() < 0.1:
        method, path, body = generator.choice(("GET", "HEAD", "POST", "PUT", "OPTIONS")), _path(generator), b""
    else:
        path = generator.choice(list(BODIES))
        method, body = "POST", mutated_body(generator, path)
    headers = [("Host", "localhost"), ("Content-Type", "application/json")]
    coding = generator.random()
    if body and coding < 0.05:
        body, headers = gzip.compress(body, 1), [*headers, ("Content-Encoding", "gzip")]
    elif body and coding < 0.08:
        body, headers = zlib.compress(body), [*headers, ("Content-Encoding", "deflate")]
    elif body and coding < 0.11:
        body, headers = zstd.compress(body), [*headers, ("Content-Encoding", "zstd")]
    if generator.random() < 0.25:
        changed = generator.choice(HEADERS)
        if changed[0] not in {"Transfer-Encoding", "Content-Length"}:
            headers = [(name, value) for name, value in headers if name != changed[0]]
        headers.append(changed)
    if body and generator.random() < 0.15:
        return _head(method, path, [*headers, ("Transfer-Encoding", "chunked")]) + _chunked(generator, body)
    return _head(method, path, [*headers, ("Content-Length", str(len(body)))]) + body


def _head(method: str, path: str, headers: list[tuple[str, str]]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def _path(generator: random.Random) -> str:
    path = generator.choice(READ_PATHS)
    return path + generator.choice(("", "/", "?a=%00", "/%2e%2e/v1/model", "//", "?" + "q" * 2000, "%ff"))


def _chunked(generator: random.Random, body: bytes) -> bytes:
    parts, start = [], 0
    while start < len(body):
        size = generator.randint(1, max(1, len(body) // 3))
        part = body[start : start + size]
        extension = generator.choice((b"", b"", b";a=b", b";" + b"x" * 50))
        parts.append(f"{len(part):x}".encode() + extension + b"\r\n" + part + b"\r\n")
        start += size
    return b"".join(parts) + b"0\r\n\r\n"


def _change_value(generator: random.Random, value: Any) -> Any:
    """Replace, remove, repeat or nest one value inside, chosen at random."""
    if isinstance(value, dict) and value and generator.random() < 0.8:
        key = generator.choice(list(value))
        action = generator.random()
        if action < 0.1:
            return {name: entry for name, entry in value.items() if name != key}
        if action < 0.2:
            return {**value, generator.choice(("unknown", "model", "items", "weights", "steps", "")): _any(generator)}
        return {**value, key: _change_value(generator, value[key])}
    if isinstance(value, list) and value and generator.random() < 0.8:
        index = generator.randrange(len(value))
        if generator.random() < 0.1:
            return value * generator.choice((0, 2, 20))
        return [*value[:index], _change_value(generator, value[index]), *value[index + 1 :]]
    return _any(generator)


def _any(generator: random.Random) -> Any:
    value = generator.choice(VALUES)
    if generator.random() < 0.03:
        for _ in range(generator.choice((5, 200))):
            value = [value]
    return value


def _unchanged(_: random.Random, body: bytes) -> bytes:
    return body


def _flip_bytes(generator: random.Random, body: bytes) -> bytes:
    changed = bytearray(body or b"{}")
    for _ in range(generator.randint(1, 4)):
        changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


def _cut(generator: random.Random, body: bytes) -> bytes:
    return body[: generator.randrange(len(body) + 1)]


def _insert(generator: random.Random, body: bytes) -> bytes:
    at = generator.randrange(len(body) + 1)
    inserted = generator.choice(
        (
            b"\x00",
            b"\xff\xfe",
            b"NaN",
            b"Infinity",
            b"\\ud800",
            b"[" * 3000,
            b'"',
            b"\\" * 999,
            b"1" * 5000,
            b"\xef\xbb\xbf",
            b"{}",
        )
    )
    return body[:at] + inserted + body[at:]


def _repeat_keys(_: random.Random, body: bytes) -> bytes:
    return body[:-1] + b"," + body[1:] if body.startswith(b"{") and len(body) > 2 else body


_BODY_CHANGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _unchanged, _unchanged, _flip_bytes, _cut, _insert, _repeat_keys,
)  # fmt: skip
