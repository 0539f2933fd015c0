"""Bodies that cost more than they look: many values, high ratios, slow bytes, malformed escapes, many messages."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from http_application import application
from hypothesis import given
from hypothesis import strategies as st

from service.errors import BodyTooLarge, BodyTooSlow, TooManyItems
from service.http import body as body_module
from service.http.body import read_json_body
from service.http.values import SMALL_BODY_BYTES, VALUES_PER_OBJECT, check_values, count_outside_strings
from service.protocols.native import RequestDefaults, parse_score_request
from service.settings import LimitSettings

MIB = 1024 * 1024
LIMITS = LimitSettings()


async def at_once(content: bytes) -> AsyncIterator[bytes]:
    yield content


def values_of(tree: Any) -> int:
    """Separators between the values of a tree, and eight for each object, counted on the tree itself."""
    if isinstance(tree, dict):
        return VALUES_PER_OBJECT + max(0, len(tree) - 1) + sum(map(values_of, tree.values()))
    if isinstance(tree, list):
        return max(0, len(tree) - 1) + sum(map(values_of, tree))
    return 0


TREES = st.recursive(
    st.none() | st.integers() | st.text('",{\\ab\n'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('",{\\ab'), inner, max_size=4),
    max_leaves=20,
)


@given(TREES, st.integers(0, 200))
def test_values_are_counted_outside_strings(tree: Any, cut: int) -> None:
    """Whatever strings hold and wherever the body is cut (not inside an escape), the count is that of the tree."""
    text = json.dumps(tree).encode()
    cut = min(cut, len(text))
    while cut < len(text) and text[cut - 1 : cut] == b"\\\\":
        cut += 1
    if (len(text[:cut]) - len(text[:cut].rstrip(b"\\\\"))) % 2:
        cut = len(text)
    first, is_inside = count_outside_strings(text[:cut], False)
    second, ends_inside = count_outside_strings(text[cut:], is_inside)
    assert (first + second, ends_inside) == (values_of(tree), False)


async def test_a_body_of_many_small_values_is_refused_before_it_is_decoded() -> None:
    """64 MiB of empty items or token ids are refused quickly; the same size of text with commas and braces passes."""
    for content in (
        b'{"items":[' + b"{}," * (20 * MIB) + b"{}]}",
        b'{"items":[{"token_ids":[' + b"1," * (30 * MIB) + b"1]}]}",
    ):
        begin = time.process_time()
        with pytest.raises(TooManyItems, match="values"):
            await read_json_body({}, at_once(content), LIMITS)
        assert time.process_time() - begin < 2.0
    text = json.dumps({"items": [{"text": 'a, {b}, "c",\\n' * (3 * MIB)}]}).encode()
    await check_values(text, LIMITS.max_request_values)


async def test_backslashes_at_the_end_of_a_step_are_counted_in_bounded_time() -> None:
    """A long run of backslashes costs no more than other bytes, and what follows it is inside or outside as in JSON."""
    values = b"1," * (4 * MIB) + b"1"
    for num_backslashes, is_refused in ((16 * MIB, True), (16 * MIB + 1, False)):
        body = b'["' + b"\\" * num_backslashes + b'",' + values + b"]"
        begin = time.thread_time()
        if is_refused:
            with pytest.raises(TooManyItems):
                await check_values(body, 4 * MIB)
        else:
            await check_values(body, 4 * MIB)  # the string does not end, so there are no values
        assert time.thread_time() - begin < 2.0  # 6 seconds where each backslash was looked at


async def test_the_limit_on_values_is_exact() -> None:
    """Above 1 MiB a body with as many values as the limit passes, and one more is refused."""
    ids = b"1000000," * (SMALL_BODY_BYTES // 8) + b"1"
    content = b'{"items":[{"token_ids":[' + ids + b"]}]}"
    count = values_of(json.loads(content))
    await check_values(content, count)
    with pytest.raises(TooManyItems):
        await check_values(content, count - 1)


async def test_the_ratio_of_a_compressed_body_is_bounded() -> None:
    """A small stream that would inflate to 60 MiB is refused early; one long prompt repeated 64 times passes."""
    bomb = gzip.compress(b"\\" * (60 * MIB))
    with pytest.raises(BodyTooLarge, match="100 times"):
        await read_json_body({"content-encoding": "gzip"}, at_once(bomb), LIMITS)
    prompt = "".join(chr(33 + (n * n) % 90) for n in range(8000))
    group = json.dumps({"items": [{"prompt": prompt, "completion": str(n)} for n in range(64)]}).encode()
    assert await read_json_body({"content-encoding": "gzip"}, at_once(gzip.compress(group)), LIMITS) == group


async def test_a_slow_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that arrives below the minimum rate gets 408 after the grace; a faster one has all the time it needs."""
    monkeypatch.setattr(body_module, "GRACE_S", 0.3)
    monkeypatch.setattr(body_module, "MIN_BYTES_PER_S", 1000)
    num_sent = 0

    async def trickle(num_bytes: int) -> AsyncIterator[bytes]:
        nonlocal num_sent
        for _ in range(30):  # 0.6 s
            yield b"a" * num_bytes
            num_sent += 1
            await asyncio.sleep(0.02)

    with pytest.raises(BodyTooSlow):
        await read_json_body({}, trickle(1), LIMITS)
    assert num_sent < 30
    assert len(await read_json_body({}, trickle(1000), LIMITS)) == 30_000


async def test_a_body_that_stops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that came fast earn no time for a pause: a large body that stops is refused after the grace."""
    monkeypatch.setattr(body_module, "GRACE_S", 0.1)
    monkeypatch.setattr(body_module, "MIN_BYTES_PER_S", 1000)

    num_sent = 0

    async def stop() -> AsyncIterator[bytes]:
        nonlocal num_sent
        yield b"a" * MIB
        for _ in range(40):  # 0.8 s
            await asyncio.sleep(0.02)
            yield b"a"
            num_sent += 1

    with pytest.raises(BodyTooSlow):
        await read_json_body({}, stop(), LIMITS)
    assert num_sent < 25


async def test_the_bodies_of_all_requests_have_a_budget(tmp_path: Path) -> None:
    """A body beyond the budget gets 503, small requests and a body on its own do not, and what is answered is free."""
    small, large = request_of(8_000), request_of(150_000)
    released = asyncio.Event()

    async def unfinished() -> AsyncIterator[bytes]:
        yield large[:-10]
        await released.wait()
        yield large[-10:]

    limits = {"max_open_body_bytes": 100_000, "max_item_chars": 200_000}
    async with application(tmp_path, limits=limits) as app:
        first = asyncio.create_task(app.client.post("/v1/score", content=unfinished()))
        await asyncio.sleep(0.05)
        for body, encoding in ((large, "identity"), (gzip.compress(large), "gzip")):
            refusal = await app.post("/v1/score", body, **{"Content-Encoding": encoding})
            assert (refusal.status_code, refusal.json()["code"]) == (503, "overloaded")
            assert int(refusal.headers["Retry-After"]) >= 1
        assert (await app.post("/v1/score", small)).status_code == 200
        released.set()
        assert (await first).status_code == 200
        assert (await app.post("/v1/score", large)).status_code == 200
        assert 'rm_shed_total{reason="overloaded"} 2.0' in app.served.metrics.render().decode()


def request_of(num_chars: int) -> bytes:
    """A request with one item that is cut to the model's limit."""
    item = {"prompt": "a" * num_chars, "completion": "b"}
    return json.dumps({"items": [item], "truncation": "prompt_left"}).encode()


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"items":[{"text":"' + b"\\" * (33 * MIB), "malformed_body"),
        (b'{"items":[{"text":"' + b"\\ud83d\\ude00" * MIB, "malformed_body"),
        (b'{"items":[{"text":"\\\\ud83d"}]', "malformed_body"),
        (b'{"items":[{"text":"\\\\\\ud83d"}]}', "invalid_request"),
        (b'{"items":[{"text":"\\ud83d\\ud83d\\ude00"}]}', "invalid_request"),
        (b'{"items":[{"text":"\\ude00"}]}', "invalid_request"),
    ],
)
def test_malformed_escapes_are_searched_in_bounded_time(content: bytes, code: str) -> None:
    """A lone surrogate is told apart from other faults, in a bounded time whatever the body holds."""
    begin = time.perf_counter()
    with pytest.raises(Exception) as refusal:  # noqa: PT011 - the code is checked
        parse_score_request(content, RequestDefaults(LIMITS, "error", "none"))
    assert time.perf_counter() - begin < 3.0  # 24 seconds before there was a bound
    assert refusal.value.code == code  # type: ignore[attr-defined]


async def test_messages_and_roles_count_before_they_are_rendered(tmp_path: Path) -> None:
    """An item with too many messages or too long a role is refused in milliseconds, on every route with messages."""
    many = [{"role": "user", "content": ""}] * 100_000
    long_role = [{"role": "u" * 2_000_000, "content": "hi"}]
    async with application(tmp_path) as app:
        for prompt in (many, long_role):
            begin = time.perf_counter()
            native = await app.post("/v1/score", {"items": [{"prompt": prompt, "completion": "a"}]})
            foreign = await app.post("/classify", {"messages": [*prompt, {"role": "assistant", "content": "a"}]})
            assert time.perf_counter() - begin < 3.0  # 9 and 12 seconds before they were counted
            assert native.status_code == foreign.status_code == (413 if prompt is long_role else 422)


@pytest.mark.parametrize("number", ["9" * 401, "1e400", "-1", "0"])
async def test_a_timeout_of_any_size_is_answered(tmp_path: Path, number: str) -> None:
    """A timeout that is no sensible number is refused, however many digits it has."""
    async with application(tmp_path) as app:
        body = b'{"items":[{"text":"a"}],"timeout_ms":' + number.encode() + b"}"
        answer = await app.post("/v1/score", body)
        assert answer.status_code in {400, 422}, answer.text
