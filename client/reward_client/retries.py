"""Retry policy: which failures are retried, after which delay, and which exception ends the retries.

Independent of HTTP: the asynchronous client translates responses into AttemptFailedError. Each retry is one record of
the logger ``reward_client``.
"""

from __future__ import annotations

import email.utils
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import tenacity

from reward_client.checks import positive_integer, positive_seconds, seconds_from_zero
from reward_client.errors import BadAnswer, ClientDeadlineExceeded, ServiceUnavailable, ServiceUnreachable

T = TypeVar("T")

LOGGER = logging.getLogger("reward_client")

DEFAULT_WAIT_FOR_START_S = 30.0
MIN_ATTEMPT_S = 5.0
"""An attempt is given at least so long, however near the deadline is."""
START_POLL_S = 2.0
"""Longest delay, without jitter, between attempts at a service that was never reached."""


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
    """Seconds without a byte after which an attempt has failed. None: half of the time that is left to the deadline, at
    least five seconds. Where other requests wait, the service refuses what it expects to take longer than that half."""

    def __post_init__(self) -> None:
        positive_integer(self.max_attempts, "max_attempts")
        for name in ("first_wait_s", "max_wait_s", "jitter_s"):
            seconds_from_zero(getattr(self, name), name)
        if self.read_timeout_s is not None:
            positive_seconds(self.read_timeout_s, "read_timeout_s")

    def attempt_s(self, left_s: float) -> float:
        """Return the seconds without a byte after which an attempt has failed that has so many to its deadline."""
        return max(MIN_ATTEMPT_S, left_s / 2) if self.read_timeout_s is None else self.read_timeout_s

    def delay_s(self, attempt: int) -> float:
        """Seconds after the failed attempt of that number, the first is 1, with jitter."""
        doubled = self.first_wait_s * 2.0 ** min(attempt - 1, 64)
        return min(self.max_wait_s, doubled + random.uniform(0, self.jitter_s))  # noqa: S311  (jitter, not a secret)


DEFAULT_RETRY_POLICY = RetryPolicy()


class AttemptFailedError(Exception):
    """An attempt failed and a retry may succeed.

    Args:
        reason: what happened, without any text of a user.
        retry_after_s: the delay that the service requested.
        not_started: whether it looks like a service that does not run or is elsewhere; such failures of a service that
            was never reached are retried for ``wait_for_start_s`` only.
    """

    def __init__(self, reason: str, retry_after_s: float | None = None, *, not_started: bool = False) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.not_started = not_started


class MixedVersionsError(AttemptFailedError):
    """The model changed during a call; rewards of two models must not be mixed in one batch."""


@dataclass(slots=True)
class Call:
    """One call of the caller: its deadline, and what has happened so far over all of its requests."""

    url: str
    """Root URL of the service and the proxy, as shown in messages."""

    deadline_s: float
    """Seconds within which the call ends."""

    wait_for_start_s: float | None
    """Seconds for which a service that was never reached is tried, whatever the number of attempts; None: the default,
    within the number of attempts."""

    is_reached: Callable[[], bool]
    """Whether the service has ever answered this client."""

    started_at: float = field(default_factory=time.monotonic)
    num_failed: int = 0
    last_failure: AttemptFailedError | None = None

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.started_at + self.deadline_s - time.monotonic()

    def start_left_s(self) -> float:
        """Seconds for which a service that was never reached is still tried."""
        return self.started_at + self.start_s - time.monotonic()

    @property
    def start_s(self) -> float:
        """Seconds for which a service that was never reached is tried."""
        return DEFAULT_WAIT_FOR_START_S if self.wait_for_start_s is None else self.wait_for_start_s

    def is_unreached(self, error: AttemptFailedError) -> bool:
        """Whether the failure is one of a service that was never reached."""
        return error.not_started and not self.is_reached()

    def describe_failure(self) -> str:
        """The last failure and the number of attempts, for a message."""
        if self.last_failure is None:
            return "the first attempt still waits for a connection or a response"
        tries = "the only try" if self.num_failed == 1 else f"last of {self.num_failed} tries"
        return f"{self.last_failure} ({tries})"

    def deadline_exceeded(self, message: str) -> ClientDeadlineExceeded:
        """Return the exception for a deadline that passed."""
        reason = str(self.last_failure or "")
        return ClientDeadlineExceeded(message, url=self.url, reason=reason, attempts=self.num_failed)


async def call_with_retries(once: Callable[[], Awaitable[T]], policy: RetryPolicy, call: Call) -> T:
    """Return the result of ``once``, called again after each AttemptFailedError according to the policy.

    Args:
        once: one attempt; any other exception is raised at once.
        policy: number of attempts and delays.
        call: the caller's deadline; gets the failures.

    Raises:
        ServiceUnavailable: all attempts failed.
        ServiceUnreachable: no connection succeeded within ``wait_for_start_s``, nor before this call.
        ClientDeadlineExceeded: the service requested a delay beyond the deadline.
        BadAnswer: the model changed during the call in every attempt.
    """

    async def attempt() -> T:
        try:
            return await once()
        except AttemptFailedError as error:
            call.num_failed += 1
            call.last_failure = error
            raise

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda error: _is_retried(error, call)),
        wait=lambda state: delay_before_retry(_failure_of(state), policy, state.attempt_number, call),
        stop=lambda state: _is_last(_failure_of(state), policy, state.attempt_number, call),
        before_sleep=lambda state: _log_retry(_failure_of(state), state.attempt_number, state.upcoming_sleep, call),
        reraise=True,
    )
    try:
        return await retrying(attempt)
    except AttemptFailedError as last:
        _raise_final(last, call)


def _is_retried(error: BaseException, call: Call) -> bool:
    if not isinstance(error, AttemptFailedError):
        return False
    return error.retry_after_s is None or error.retry_after_s < call.left_s()


def _is_last(error: AttemptFailedError, policy: RetryPolicy, attempt: int, call: Call) -> bool:
    if call.is_unreached(error) and call.start_left_s() <= 0:
        return True
    return attempt >= policy.max_attempts and not (call.is_unreached(error) and call.wait_for_start_s is not None)


def delay_before_retry(error: AttemptFailedError, policy: RetryPolicy, attempt: int, call: Call) -> float:
    """Return the seconds between a failed attempt, the first is 1, and the next one."""
    if error.retry_after_s is not None:
        return error.retry_after_s + random.uniform(0, policy.jitter_s)  # noqa: S311  (jitter, not a secret)
    delay_s = policy.delay_s(attempt)
    if call.is_unreached(error):
        return max(0.0, min(delay_s, START_POLL_S, call.start_left_s()))
    return delay_s


def _failure_of(state: tenacity.RetryCallState) -> AttemptFailedError:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, AttemptFailedError)  # noqa: S101  (tenacity asks only after a failure that is retried)
    return error


def _log_retry(error: AttemptFailedError, attempt: int, delay_s: float, call: Call) -> None:
    # A delay that the service asks for is its ordinary answer to load; everything else is a fault.
    level = logging.WARNING if error.retry_after_s is None else logging.INFO
    LOGGER.log(level, "%s: attempt %d failed: %s; next attempt in %.2f s", call.url, attempt, error, delay_s)


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


def _raise_final(last: AttemptFailedError, call: Call) -> NoReturn:
    if isinstance(last, MixedVersionsError):
        raise BadAnswer(f"In every attempt, {last}") from last
    if last.retry_after_s is not None and last.retry_after_s >= call.left_s():
        left_s = max(call.left_s(), 0.0)
        raise call.deadline_exceeded(
            f"{call.url} requests a delay of {last.retry_after_s:g} s, but {left_s:.1f} s are left: {last}"
        ) from last
    message = f"No answer from {call.url}: {call.describe_failure()}"
    if call.is_unreached(last):
        message += ". It has never answered: check the URL; wait_for_start_s sets how long a start is waited for"
    kind = ServiceUnreachable if call.is_unreached(last) else ServiceUnavailable
    raise kind(message, url=call.url, reason=str(last), attempts=call.num_failed) from last
