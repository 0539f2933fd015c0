"""Errors as they cross HTTP: RFC 9457 problems.

One table, the error tree itself: status, code and title stand on the class, and nothing here knows a web framework or
what went wrong. Details are ours to write and hold no user text, so they can be shown as they are.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec

from service.errors import Draining, EngineUnavailable, HttpError, InvalidRequest, NotReady, Overloaded

MEDIA_TYPE = "application/problem+json"
JITTER = 0.25
"""Share of the waiting time by which Retry-After is spread, so that refused workers do not return in step."""

_WAIT_S: dict[type[HttpError], float] = {NotReady: 5.0, Draining: 2.0, EngineUnavailable: 10.0}


def problem_type(error: HttpError) -> str:
    """The stable URI of this kind of problem; it names, it does not resolve."""
    return f"urn:reward-service:problem:{error.code}"


def problem(error: HttpError, request_id: str) -> dict[str, Any]:
    """Describe an error as the members of a problem document.

    ``errors`` (RFC 6901 pointer and code of each broken rule) is there only for an InvalidRequest that knows them.
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
        members["errors"] = [{"pointer": broken.pointer, "code": broken.code} for broken in error.violations]
    return members


def render_problem(error: HttpError, request_id: str) -> bytes:
    """Render an error as the body of an answer."""
    return msgspec.json.encode(problem(error, request_id))


def item_error(error: HttpError) -> dict[str, Any]:
    """Describe the failure of one item inside an answer whose other items have rewards."""
    return {
        "type": problem_type(error),
        "title": error.title,
        "detail": error.detail or error.title,
        "code": error.code,
    }


def retry_after_s(error: HttpError, jitter: float) -> int | None:
    """Whole seconds for the Retry-After header, at least one; None for an error that is no 503.

    Args:
        error: what the answer says.
        jitter: a number in [0, 1) that the caller draws anew for each answer.
    """
    if error.status != 503:
        return None
    wait_s = error.retry_after_s if isinstance(error, Overloaded) else _WAIT_S.get(type(error), 1.0)
    return max(1, math.ceil(wait_s * (1.0 + JITTER * jitter)))
