"""Retry policy: which failures are retried, after which delay, and which exception ends the retries.

Independent of HTTP: the asynchronous client translates responses into AttemptFailedError.
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
    """Exponential backoff with jitter; the client's deadline ends it in any case.

    The n-th delay is ``first_wait_s`` x 2^(n-1) plus up to ``jitter_s``, at most ``max_wait_s``; the defaults cover an
    outage of about four minutes. A Retry-After header replaces the delay, with the same jitter added, so that many
    workers do not retry at the same moment.
    """

    max_attempts: int = 16
    """Attempts in all, the first one included."""

    first_wait_s: float = 0.1
    """Seconds before the second attempt."""

    max_wait_s: float = 30.0
    """Longest delay in seconds."""

    jitter_s: float = 0.5
    """Upper end of the uniform random seconds added to a delay."""

    read_timeout_s: float | None = None
    """Seconds without a byte after which an attempt has failed; None: only the deadline bounds it."""


DEFAULT_RETRY_POLICY = RetryPolicy()


class AttemptFailedError(Exception):
    """An attempt failed and a retry may succeed; ``retry_after_s``: the delay that the service requested."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class MixedVersionsError(AttemptFailedError):
    """The model changed during a call; rewards of two models must not be mixed in one batch."""


async def call_with_retries(once: Callable[[], Awaitable[T]], policy: RetryPolicy, time_left: Callable[[], float]) -> T:
    """Return the result of ``once``, called again after each AttemptFailedError according to the policy.

    Args:
        once: one attempt; any other exception is raised at once.
        policy: number of attempts and delays.
        time_left: seconds until the caller's deadline.

    Raises:
        ServiceUnavailable: all attempts failed.
        ClientDeadlineExceeded: the service requested a delay beyond the deadline.
        BadAnswer: the model changed during the call in every attempt.
    """

    def wait(error: Exception) -> bool | float:
        """Whether to retry: no, yes, or yes after that many seconds (stamina's backoff hook)."""
        if not isinstance(error, AttemptFailedError):
            return False
        if error.retry_after_s is None:
            return True
        # Jitter, not a secret.
        return error.retry_after_s < time_left() and error.retry_after_s + random.uniform(0, policy.jitter_s)  # noqa: S311

    retrying = stamina.AsyncRetryingCaller(
        attempts=policy.max_attempts,
        timeout=None,
        wait_initial=policy.first_wait_s,
        wait_max=policy.max_wait_s,
        wait_jitter=policy.jitter_s,
    )
    try:
        return await retrying(wait, once)
    except AttemptFailedError as last:
        _raise_final(last, time_left())


def read_retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds of a Retry-After header; None where it cannot be parsed.

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


def _raise_final(last: AttemptFailedError, left_s: float) -> NoReturn:
    if isinstance(last, MixedVersionsError):
        raise BadAnswer(f"In every attempt, {last}") from last
    if last.retry_after_s is not None and last.retry_after_s >= left_s:
        raise ClientDeadlineExceeded(
            f"The service requests a delay of {last.retry_after_s:g} s, but {max(left_s, 0.0):.1f} s are left: {last}"
        ) from last
    raise ServiceUnavailable(f"All attempts failed; the last error: {last}") from last
