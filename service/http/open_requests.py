"""Count the requests that are not answered yet, so that a shutdown can wait for them."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class OpenRequests:
    """The requests that have arrived and whose last byte has not been sent; a context manager for each request."""

    def __init__(self) -> None:
        self._num_open = 0
        self._none = asyncio.Event()
        self._none.set()

    @property
    def num_open(self) -> int:
        """Number of these requests."""
        return self._num_open

    def __enter__(self) -> None:
        self._num_open += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._num_open -= 1
        if not self._num_open:
            self._none.set()

    async def wait_until_none(self, timeout_s: float) -> None:
        """Return once no request is open, or after ``timeout_s`` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none.wait()
