"""What is tried again, when, and what the caller is told when nothing helped.

It knows failures and waits, not HTTP: the asynchronous client translates answers into TryFailedError.
"""

from __future__ import annotations

import email.utils
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import stamina

from reward_client.errors import BadAnswer, ClientDeadlineExceeded, ServiceUnavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how patiently a request is repeated; the client's deadline ends it in any case.

    The n-th wait is ``first_wait_s`` x 2^(n-1) plus up to ``jitter_s``, at most ``max_wait_s``; the defaults ride out
    some four minutes. A Retry-After of the service replaces it, with the same jitter on top, so that a hundred workers
    do not come back at once. ``try_timeout_s``: longest silence of a connection before the try counts as broken; None:
    only the deadline bounds it.
    """

    max_tries: int = 16
    first_wait_s: float = 0.1
    max_wait_s: float = 30.0
    jitter_s: float = 0.5
    try_timeout_s: float | None = None


DEFAULT_RETRIES = RetryPolicy()


class TryFailedError(Exception):
    """One try failed in a way that may pass; ``retry_after_s``: when the service asked to come back, if it did."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class MixedVersionsError(TryFailedError):
    """The model changed in the middle of a call; rewards of two models must not stand in one batch."""


async def until_done(once: Callable[[], Awaitable[T]], policy: RetryPolicy, time_left: Callable[[], float]) -> T:
    """Return what ``once`` returns, called again after each TryFailedError as the policy says.

    Args:
        once: one try; any other exception of its ends the matter.
        policy: tries and waits.
        time_left: seconds until the caller's deadline.

    Raises:
        ServiceUnavailable: the tries are spent.
        ClientDeadlineExceeded: the service asked to wait beyond the deadline.
        BadAnswer: in every try the model changed in the middle.
    """

    def wait(error: Exception) -> bool | float:
        """Whether to try again: no, yes, or yes after that many seconds (stamina's backoff hook)."""
        if not isinstance(error, TryFailedError):
            return False
        if error.retry_after_s is None:
            return True
        # Jitter against a stampede, not a secret.
        return error.retry_after_s < time_left() and error.retry_after_s + random.uniform(0, policy.jitter_s)  # noqa: S311

    retrying = stamina.AsyncRetryingCaller(
        attempts=policy.max_tries,
        timeout=None,
        wait_initial=policy.first_wait_s,
        wait_max=policy.max_wait_s,
        wait_jitter=policy.jitter_s,
    )
    try:
        return await retrying(wait, once)
    except TryFailedError as last:
        _give_up(last, time_left())


def read_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks to wait; None where it says nothing readable.

    Args:
        value: the header: seconds or an HTTP date (RFC 9110 section 10.2.3).
        now: Unix time, which the date is compared with.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _give_up(last: TryFailedError, left_s: float) -> NoReturn:
    if isinstance(last, MixedVersionsError):
        raise BadAnswer(f"In every try, {last}") from last
    if last.retry_after_s is not None and last.retry_after_s >= left_s:
        raise ClientDeadlineExceeded(
            f"The service asks to wait {last.retry_after_s:g} s, {max(left_s, 0.0):.1f} s are left: {last}"
        ) from last
    raise ServiceUnavailable(f"The tries are spent; the last ended with: {last}") from last
