"""Read the bytes of a request body under limits on size, speed and number of values.

Bytes are counted while they arrive, so neither a wrong Content-Length nor a small gzip stream of a large text takes
more memory than the limit. Parsing them is left to the module of each wire format.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from service.errors import BodyTooLarge, BodyTooSlow, UnsupportedMediaType
from service.http.body_budget import BodyAccount, BodyBudget
from service.http.inflation import CODINGS, inflate
from service.http.values import check_values
from service.settings import LimitSettings

GRACE_S = 10.0
"""Seconds for which a body may fall behind ``MIN_BYTES_PER_S``. Bytes that came faster earn no more time than that, so
that a large body cannot stop for minutes before its end."""
MIN_BYTES_PER_S = 16 * 1024


async def read_json_body(
    headers: Mapping[str, str],
    chunks: AsyncIterator[bytes],
    limits: LimitSettings,
    account: BodyAccount | None = None,
    *,
    any_media_type: bool = False,
) -> bytes:
    """Read the body of a JSON request, plain or compressed with gzip, zstd or deflate.

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
    if coding != "identity" and coding not in CODINGS:
        raise UnsupportedMediaType(
            "The Content-Encoding is none of gzip, zstd, deflate and identity; send the body plain or gzipped"
        )
    max_bytes = limits.max_request_bytes
    declared = headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > max_bytes:
        raise BodyTooLarge(f"The body has {declared} bytes; the limit is {max_bytes}")
    account = account or BodyAccount(BodyBudget(max_bytes))
    body = await _read(chunks, max_bytes, account)
    if coding != "identity":
        body = await inflate(body, coding, max_bytes, account)
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
