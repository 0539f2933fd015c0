"""Counts the values of a JSON body before it is decoded, because decoding many small values blocks the event loop.

A decoder spends up to half a microsecond on a value and holds the interpreter's lock meanwhile: 64 MiB of ``{},`` would
take seconds. Counting separators takes a few milliseconds a megabyte at most.
"""

from __future__ import annotations

import asyncio

from service.errors import TooManyItems

SMALL_BODY_BYTES = 1024 * 1024
"""Bodies up to this size are not counted: they decode in a tenth of a second whatever they hold."""
VALUES_PER_OBJECT = 8
"""Values that an object counts for, as it takes that much longer to decode."""
_STEP = 1024 * 1024
_OTHERS = bytes(set(range(256)) - set(b'"\\,{'))
"""Every byte that neither separates values nor decides whether one is inside a string."""


async def check_values(body: bytes, max_values: int) -> None:
    """Check the number of values of a body; what stands inside strings does not count.

    Args:
        body: JSON, not yet decoded.
        max_values: elements of lists and members of objects; an object counts `VALUES_PER_OBJECT` more.

    Raises:
        TooManyItems: there are more.
    """
    if len(body) <= SMALL_BODY_BYTES or _count(body) <= max_values:
        return
    total, is_inside, begin = 0, False, 0
    while begin < len(body):
        end = _end_of_step(body, begin)
        count, is_inside = count_outside_strings(body[begin:end], is_inside)
        total += count
        if total > max_values:
            raise TooManyItems(f"The body has more than {max_values} values; split the request")
        begin = end
        await asyncio.sleep(0)


def count_outside_strings(part: bytes, is_inside: bool) -> tuple[int, bool]:
    """Count the values of a part of a body.

    Args:
        part: does not end within an escape.
        is_inside: whether it begins inside a string.

    Returns:
        The count, and whether the part ends inside a string.
    """
    unescaped = part.replace(b"\\\\", b"").replace(b'\\"', b"")
    pieces = unescaped.translate(None, _OTHERS).split(b'"')
    outside = pieces[1::2] if is_inside else pieces[::2]
    return _count(b"".join(outside)), is_inside == (len(pieces) % 2 == 1)


def _count(text: bytes) -> int:
    return text.count(b",") + VALUES_PER_OBJECT * text.count(b"{")


def _end_of_step(body: bytes, begin: int) -> int:
    """Return where a step that does not begin within an escape ends: not within one either.

    It takes time in proportion to the step, however many backslashes follow each other.
    """
    end = min(begin + _STEP, len(body))
    part = body[begin:end]
    num_backslashes = len(part) - len(part.rstrip(b"\\"))
    return min(end + num_backslashes % 2, len(body))
