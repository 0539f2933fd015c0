"""Compressed bodies in the form of Zstandard: several frames, windows, ratio, truncation, and work per step."""

from __future__ import annotations

import asyncio
import os
import time

import pytest
from backports import zstd
from backports.zstd import CompressionParameter

from service.errors import BodyTooLarge, HttpError, MalformedBody
from service.http.body_budget import MAX_LARGE_WINDOWS, BodyAccount, BodyBudget
from service.http.inflation import FREE_INFLATED_BYTES, MAX_ZSTD_FRAMES, inflate

MIB = 1024 * 1024
LIMIT = 64 * MIB
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
"""A frame of three bytes that decoders skip (RFC 8878, section 3.1.2)."""


async def inflated(stream: bytes, max_bytes: int = LIMIT) -> bytes:
    return await inflate(stream, "zstd", max_bytes, BodyAccount(BodyBudget(LIMIT)))


def frame_of(content: bytes, **options: int) -> bytes:
    return zstd.compress(content, options={CompressionParameter[name]: value for name, value in options.items()})


async def test_frames_are_joined() -> None:
    """Several frames, empty and skippable ones among them, give the contents in order, as RFC 8878 says."""
    content = os.urandom(3 * MIB)
    stream = (
        frame_of(content[:MIB], checksum_flag=1)
        + SKIPPABLE
        + frame_of(b"")
        + frame_of(content[MIB:], content_size_flag=0)
    )
    assert await inflated(stream) == content


async def test_the_number_of_frames_is_bounded() -> None:
    """As many frames as the limit are read, one more is refused, and millions of them cost no time."""
    frame = frame_of(b"a")
    assert await inflated(frame * MAX_ZSTD_FRAMES) == b"a" * MAX_ZSTD_FRAMES
    begin = time.thread_time()
    for frames in (frame * (MAX_ZSTD_FRAMES + 1), SKIPPABLE * (4 * MIB)):
        with pytest.raises(MalformedBody, match="frames"):
            await inflated(frames)
    assert time.thread_time() - begin < 1.0


async def test_the_window_is_bounded() -> None:
    """A frame with the largest window that HTTP allows is read; a larger one is refused before memory is taken."""
    content = os.urandom(9 * MIB) + b"end"
    assert await inflated(frame_of(content, window_log=23, content_size_flag=0)) == content
    with pytest.raises(MalformedBody, match="8 MiB"):
        await inflated(frame_of(content, window_log=27, content_size_flag=0))


async def test_the_ratio_is_bounded() -> None:
    """A small stream that would inflate to 60 MiB is refused early, and one of free size passes."""
    assert len(await inflated(frame_of(b"a" * FREE_INFLATED_BYTES))) == FREE_INFLATED_BYTES
    begin = time.thread_time()
    with pytest.raises(BodyTooLarge, match="100 times"):
        await inflated(frame_of(b"a" * (60 * MIB)))
    with pytest.raises(BodyTooLarge, match="more than 1000 bytes"):
        await inflated(frame_of(b"a" * 1001), 1000)
    assert time.thread_time() - begin < 1.0


async def test_a_damaged_stream_is_malformed() -> None:
    """Cut anywhere, or with any byte changed, a stream with a checksum is refused or gives the same content."""
    content = os.urandom(200) + b"a" * 200
    stream = frame_of(content, checksum_flag=1)
    for end in range(len(stream)):
        with pytest.raises(MalformedBody):
            await inflated(stream[:end])
    for index in range(len(stream)):
        changed = bytearray(stream)
        changed[index] ^= 0x41
        try:
            assert await inflated(bytes(changed)) == content
        except HttpError as error:
            assert isinstance(error, MalformedBody)  # noqa: PT017 - either outcome is right


async def test_other_tasks_run_between_the_steps() -> None:
    """While a large body is decompressed the event loop gets control every megabyte, and few bodies hold windows."""
    stream = frame_of(os.urandom(MIB) * 4)
    budget = BodyBudget(100 * LIMIT)
    turns = 0
    done = asyncio.Event()

    async def count_turns() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    await inflate(stream, "zstd", LIMIT, BodyAccount(budget))
    done.set()
    await counting
    assert turns >= 4
    bodies = [inflate(stream, "zstd", LIMIT, BodyAccount(budget)) for _ in range(MAX_LARGE_WINDOWS + 2)]
    gathered = asyncio.gather(*bodies)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert budget.large_windows.locked()
    assert {len(body) for body in await gathered} == {4 * MIB}
