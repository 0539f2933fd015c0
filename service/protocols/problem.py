"""Errors on the wire: RFC 9457 problems.

The only table is the error tree itself: status, code and title are attributes of the class. Details are written by the
service and contain no user text, so they are sent as they are.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from service.errors import Draining, EngineUnavailable, HttpError, InvalidRequest, NotReady, RetryLater

MEDIA_TYPE = "application/problem+json"
JITTER = 0.25
"""Share of the waiting time by which Retry-After is spread, so that refused clients do not return simultaneously."""

_WAIT_S: dict[type[HttpError], float] = {NotReady: 5.0, Draining: 2.0, EngineUnavailable: 10.0}


def problem_type(error: HttpError) -> str:
    """The stable URI of this kind of problem; an identifier, not an address."""
    return f"urn:reward-service:problem:{error.code}"


def problem(error: HttpError, request_id: str) -> dict[str, Any]:
    """Return the members of a problem document.

    ``errors`` (RFC 6901 pointer and code of each violation) is there only for an InvalidRequest that has violations.
    """
    members: dict[str, Any] = {
        "type": problem_type(error),
        "title": error.title,
        "status": error.status,
        "detail": error.detail or error.title,
        "instance": f"urn:request:{request_id}",
        "code": error.code,
        "retryable": error.retryable,
    }
    if isinstance(error, InvalidRequest) and error.violations:
        members["errors"] = [{"pointer": violation.pointer, "code": violation.code} for violation in error.violations]
    return members


def render_problem(error: HttpError, request_id: str) -> bytes:
    """Render an error as the body of an answer."""
    return msgspec.json.encode(problem(error, request_id))


def item_error(error: HttpError) -> dict[str, Any]:
    """Return the ``error`` of one item in an answer whose other items may have rewards."""
    return {
        "type": problem_type(error),
        "title": error.title,
        "detail": error.detail or error.title,
        "code": error.code,
    }


def retry_after_s(error: HttpError, jitter: float) -> int | None:
    """Whole seconds for the Retry-After header, at least one; None for an error that is neither a 503 nor a quota.

    Args:
        error: of the answer.
        jitter: a random number in [0, 1), another one for each answer.
    """
    if isinstance(error, RetryLater):
        wait_s = error.retry_after_s
    elif error.status == 503:
        wait_s = _WAIT_S.get(type(error), 1.0)
    else:
        return None
    return max(1, math.ceil(wait_s * (1.0 + JITTER * jitter)))
