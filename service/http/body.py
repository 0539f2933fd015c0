"""Read the bytes of a request body under limits on size, speed and number of values.

Bytes are counted while they arrive, so neither a wrong Content-Length nor a small gzip stream of a large text takes
more memory than the limit. Parsing them is left to the module of each wire format.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Mapping

from service.errors import BodyTooLarge, BodyTooSlow, MalformedBody, UnsupportedMediaType
from service.http.body_budget import BodyAccount, BodyBudget
from service.http.values import check_values
from service.settings import LimitSettings

_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_ZLIB_WINDOW = zlib.MAX_WBITS
MAX_RATIO = 100
"""How much larger a body may be than its compressed form."""
FREE_INFLATED_BYTES = 8 * 1024 * 1024
"""Up to this size any ratio is allowed: completions that repeat one long prompt compress well."""
GRACE_S = 10.0
"""Seconds for which a body may fall behind ``MIN_BYTES_PER_S``. Bytes that came faster earn no more time than that, so
that a large body cannot stop for minutes before its end."""
MIN_BYTES_PER_S = 16 * 1024
_INFLATE_STEP = 1024 * 1024
"""Bytes inflated before control returns to the event loop."""


async def read_json_body(
    headers: Mapping[str, str],
    chunks: AsyncIterator[bytes],
    limits: LimitSettings,
    account: BodyAccount | None = None,
    *,
    any_media_type: bool = False,
) -> bytes:
    """Read the body of a JSON request, plain or compressed with gzip or deflate.

    Args:
        headers: of the request; names in lower case.
        chunks: the body as it arrives.
        limits: ``max_request_bytes`` holds for the bytes received, and again after decompression.
        account: counts the bytes in the budget of all requests; None: there is none.
        any_media_type: whether the Content-Type is ignored.

    Raises:
        Overloaded: the bodies of all requests are too large together.
        UnsupportedMediaType: the Content-Type is not JSON (a missing one is taken for JSON), or the coding is another.
        BodyTooLarge: a limit on bytes is exceeded; nothing beyond it is stored.
        BodyTooSlow: it does not arrive in time.
        TooManyItems: it has more than ``max_request_values`` values.
        MalformedBody: the compressed stream is corrupt, truncated, or followed by other bytes.
    """
    if not any_media_type:
        _check_media_type(headers.get("content-type", ""))
    coding = headers.get("content-encoding", "identity").strip().lower()
    if coding not in {"identity", "gzip", "deflate"}:
        raise UnsupportedMediaType(
            "The Content-Encoding is none of gzip, deflate and identity; send the body plain or gzipped"
        )
    max_bytes = limits.max_request_bytes
    declared = headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > max_bytes:
        raise BodyTooLarge(f"The body has {declared} bytes; the limit is {max_bytes}")
    account = account or BodyAccount(BodyBudget(max_bytes))
    body = await _read(chunks, max_bytes, account)
    if coding != "identity":
        body = await _inflate(body, max_bytes, _GZIP_WINDOW if coding == "gzip" else _ZLIB_WINDOW, account)
    await check_values(body, limits.max_request_values)
    return body


def _check_media_type(content_type: str) -> None:
    media_type, _, parameters = content_type.lower().partition(";")
    if media_type.strip() not in {"", "application/json", "text/json"}:
        raise UnsupportedMediaType("The body is not declared as JSON; send Content-Type: application/json")
    charset = parameters.partition("charset=")[2].strip(' "')
    if charset and charset not in {"utf-8", "utf8"}:
        raise UnsupportedMediaType("JSON is read as UTF-8 only; send Content-Type: application/json")


async def _read(chunks: AsyncIterator[bytes], max_bytes: int, account: BodyAccount) -> bytes:
    body = bytearray()
    clock = asyncio.get_running_loop().time
    give_up_at = clock() + GRACE_S
    try:
        async with asyncio.timeout_at(give_up_at) as patience:
            async for chunk in chunks:
                if len(body) + len(chunk) > max_bytes:
                    raise BodyTooLarge(f"The body has more than {max_bytes} bytes")
                account.grow(len(chunk))
                body += chunk
                give_up_at = min(give_up_at + len(chunk) / MIN_BYTES_PER_S, clock() + GRACE_S)
                patience.reschedule(give_up_at)
    except TimeoutError:
        raise BodyTooSlow(
            f"The body fell {GRACE_S:g} seconds behind a rate of {MIN_BYTES_PER_S} bytes a second"
        ) from None
    return bytes(body)


async def _inflate(compressed: bytes, max_bytes: int, window: int, account: BodyAccount) -> bytes:
    inflater = zlib.decompressobj(window)
    max_ratio_bytes = max(FREE_INFLATED_BYTES, MAX_RATIO * len(compressed))
    body = bytearray()
    rest = compressed
    while rest and not inflater.eof:
        try:
            part = inflater.decompress(rest, min(_INFLATE_STEP, max_bytes + 1 - len(body)))
        except zlib.error:
            raise MalformedBody("The body is not the stream that its Content-Encoding announces") from None
        account.grow(len(part))
        body += part
        if len(body) > max_bytes:
            raise BodyTooLarge(f"The body has more than {max_bytes} bytes after decompression")
        if len(body) > max_ratio_bytes:
            raise BodyTooLarge(f"The body is more than {MAX_RATIO} times as large as its compressed form")
        rest = inflater.unconsumed_tail
        await asyncio.sleep(0)
    if not inflater.eof or inflater.unused_data:
        raise MalformedBody("The compressed stream is truncated or followed by other bytes")
    return bytes(body)
