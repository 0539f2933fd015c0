"""A budget of memory for the bodies of all open requests of a replica, however many connections send them.

The queue bounds the work that waits in tokens; bodies that are still being received, or parsed, are not in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.errors import Overloaded

FREE_BYTES = 16 * 1024
"""Bytes of each body that are not counted, so that no number of large bodies keeps small requests out."""
RETRY_AFTER_S = 1.0
MAX_LARGE_WINDOWS = 8
"""Bodies that may be decompressed at once with a window of megabytes, which the bytes of a body do not show."""


class BodyBudget:
    """The bytes of the bodies of all open requests.

    Args:
        max_bytes: a body that would exceed it is refused, unless it is the only one that counts.
        on_refusal: called for each refused body.
    """

    def __init__(self, max_bytes: int, on_refusal: Callable[[], None] = lambda: None) -> None:
        self.num_bytes = 0
        self.large_windows = asyncio.Semaphore(MAX_LARGE_WINDOWS)
        self._max_bytes = max_bytes
        self._on_refusal = on_refusal

    def take(self, num_bytes: int, own_bytes: int) -> None:
        """Take bytes for a body that has taken ``own_bytes`` already.

        Raises:
            Overloaded: the budget does not have them; nothing is taken.
        """
        if self.num_bytes + num_bytes > self._max_bytes and self.num_bytes > own_bytes:
            self._on_refusal()
            raise Overloaded(
                f"The bodies of open requests have {self.num_bytes} bytes; the limit is {self._max_bytes}.",
                RETRY_AFTER_S,
            )
        self.num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Give bytes back."""
        self.num_bytes -= num_bytes


class BodyAccount:
    """The part of one request in the budget; it is released once the request is answered."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._num_bytes = 0
        self._num_counted = 0

    @property
    def large_window(self) -> asyncio.Semaphore:
        """Held while the body is decompressed with a window of megabytes."""
        return self._budget.large_windows

    def grow(self, num_bytes: int) -> None:
        """Count more bytes, received or decompressed.

        Raises:
            Overloaded: as `BodyBudget.take`.
        """
        self._num_bytes += num_bytes
        uncounted = max(0, self._num_bytes - FREE_BYTES) - self._num_counted
        if uncounted:
            self._budget.take(uncounted, self._num_counted)
            self._num_counted += uncounted

    def release(self) -> None:
        """Give all back."""
        self._budget.give_back(self._num_counted)
        self._num_counted = 0
