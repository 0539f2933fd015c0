"""Decompress request bodies in steps of bounded time and memory.

`MAX_RATIO` and the limit on bytes hold for what comes out, so a small stream of a large text costs no more than they
allow.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from functools import partial
from typing import TypeAlias

from backports import zstd

from service.errors import BodyTooLarge, MalformedBody
from service.http.body_budget import BodyAccount

MAX_RATIO = 100
"""How much larger a body may be than its compressed form."""
FREE_INFLATED_BYTES = 8 * 1024 * 1024
"""Up to this size any ratio is allowed: completions that repeat one long prompt compress well."""
MAX_ZSTD_WINDOW_LOG = 23
"""Largest window of a zstd frame, 8 MiB: encoders in HTTP must not exceed it, decoders must support it (RFC 9659)."""
MAX_ZSTD_FRAMES = 1024
"""Frames of a zstd body, skippable ones included; each costs a decoder. Parallel encoders make one per MiB or more."""
_STEP_BYTES = 1024 * 1024
"""Bytes that come out before control returns to the event loop."""
_INPUT_BYTES = 64 * 1024
"""Bytes that a zstd decoder is given at a time: what follows a frame is copied, so it must be short."""

_Steps: TypeAlias = Iterator[bytes]


async def inflate(compressed: bytes, coding: str, max_bytes: int, account: BodyAccount) -> bytes:
    """Decompress a body.

    Args:
        compressed: the whole body.
        coding: one of `CODINGS`.
        max_bytes: of the result.
        account: counts the bytes of the result in the budget of all requests.

    Raises:
        Overloaded: the bodies of all requests are too large together.
        BodyTooLarge: the limit on bytes or on the ratio is exceeded; at most a step beyond it is held.
        MalformedBody: the stream is corrupt, truncated, followed by other bytes, or needs more than a decoder may use.
    """
    steps = _STEPS[coding](compressed)
    async with account.large_window if coding == "zstd" else nullcontext():  # 8 MiB; those of the others have 32 KiB
        return await _collect(steps, len(compressed), max_bytes, account)


async def _collect(steps: _Steps, num_compressed: int, max_bytes: int, account: BodyAccount) -> bytes:
    max_ratio_bytes = max(FREE_INFLATED_BYTES, MAX_RATIO * num_compressed)
    body = bytearray()
    for part in steps:
        num_bytes = len(body) + len(part)
        if num_bytes > max_bytes:
            raise BodyTooLarge(f"The body has more than {max_bytes} bytes after decompression")
        if num_bytes > max_ratio_bytes:
            raise BodyTooLarge(f"The body is more than {MAX_RATIO} times as large as its compressed form")
        account.grow(len(part))
        body += part
        await asyncio.sleep(0)
    return bytes(body)


def _zlib_steps(compressed: bytes, window_bits: int) -> _Steps:
    inflater = zlib.decompressobj(window_bits)
    rest = compressed
    while rest and not inflater.eof:
        try:
            yield inflater.decompress(rest, _STEP_BYTES)
        except zlib.error:
            raise MalformedBody("The body is not the stream that its Content-Encoding announces") from None
        rest = inflater.unconsumed_tail
    if not inflater.eof or inflater.unused_data:
        raise MalformedBody("The compressed stream is truncated or followed by other bytes")


def _zstd_steps(compressed: bytes) -> _Steps:
    """Decompress one or more frames, which is what a stream consists of (RFC 8878, section 3.1)."""
    rest = memoryview(compressed)
    for _ in range(MAX_ZSTD_FRAMES):
        num_taken = yield from _zstd_frame_steps(rest)
        rest = rest[num_taken:]
        if not rest:
            return
    raise MalformedBody(f"The body has more than {MAX_ZSTD_FRAMES} Zstandard frames")


def _zstd_frame_steps(stream: memoryview) -> Generator[bytes, None, int]:
    """Decompress the first frame of a stream; return how many bytes it has."""
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_ZSTD_WINDOW_LOG})
    num_given = 0
    while not decoder.eof:
        given = stream[num_given : num_given + _INPUT_BYTES] if decoder.needs_input else b""
        if decoder.needs_input and not given:
            raise MalformedBody("The compressed stream is truncated")
        num_given += len(given)
        try:
            yield decoder.decompress(given, _STEP_BYTES)
        except zstd.ZstdError:
            raise MalformedBody("The body is no Zstandard stream with windows of at most 8 MiB (RFC 9659)") from None
    return num_given - len(decoder.unused_data)


_STEPS: dict[str, Callable[[bytes], _Steps]] = {
    "gzip": partial(_zlib_steps, window_bits=16 + zlib.MAX_WBITS),
    "deflate": partial(_zlib_steps, window_bits=zlib.MAX_WBITS),
    "zstd": _zstd_steps,
}
CODINGS = frozenset(_STEPS)
"""Values of Content-Encoding that are understood, besides ``identity``."""
