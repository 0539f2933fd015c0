"""What the access log and the response headers report about one request."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass, field
from typing import Protocol

from reward_client.signatures import NONCE, NONCE_HEADER
from starlette.requests import Request
from starlette.types import Scope

from service.errors import InvalidRequest
from service.http.body_budget import BodyAccount
from service.http.loop_load import LoopLoad
from service.records import Timings

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-((?!0{16})[0-9a-f]{16})-([0-9a-f]{2})")
"""Version, trace id, span id and flags; an id of zeros is not valid (W3C Trace Context, section 3.2)."""

_SAMPLED = 1
"""Flag of a traceparent whose caller records its trace."""

_IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Quota(Protocol):
    """What an API key may still use."""

    def take(self, num_items: int) -> None:
        """Take the items of one request.

        Raises:
            QuotaExceeded: there are not enough; nothing is taken.
        """
        ...

    def give_back(self, num_items: int) -> None:
        """Give back the items of a request that the service could not accept."""
        ...


@dataclass(slots=True)
class RequestFacts:
    """Facts about one request; each is set by the code that learns it."""

    request_id: str
    """``X-Request-Id`` of the client if it is valid, else a new one."""
    code: str | None = None
    """Problem code of the answer; None: no problem."""
    items: int | None = None
    """Number of items."""
    failed: int | None = None
    """Number of items without a reward."""
    scored_tokens: int | None = None
    """Number of tokens of the scored sequences."""
    timings: Timings | None = None
    """Seconds of each stage; None: nothing was scored."""
    key: str | None = None
    """Name of the API key; None: the service has no keys, or the route needs none."""
    is_admin: bool = True
    """Whether the caller may read what concerns other callers; without keys everybody may."""
    quota: Quota | None = None
    """Items that the key may still have scored; None: any number."""
    load: LoopLoad | None = None
    """The load of the event loop; None: no model is loaded."""
    waited_s: float = 0.0
    """Seconds for which it waited before the service saw it, by the lag of the event loop."""
    body: BodyAccount | None = None
    """The part of its body in the budget of all bodies; None: no model is loaded, and no body is read."""
    started_at: float = field(default_factory=time.perf_counter)
    """``time.perf_counter()`` when the service saw it."""

    @property
    def age_s(self) -> float:
        """Seconds since it arrived."""
        return self.waited_s + time.perf_counter() - self.started_at


def facts_of(request: Request) -> RequestFacts:
    """The facts that the middleware attached to a request."""
    facts: RequestFacts = request.state.facts
    return facts


def request_id_of(scope: Scope) -> str:
    """The client's ``X-Request-Id`` if it can be logged as it is, else a new random one."""
    return as_request_id(next((value for name, value in scope["headers"] if name == b"x-request-id"), None))


def as_request_id(given: bytes | None) -> str:
    """A client's ``X-Request-Id`` if it can be logged as it is, else a new random one."""
    text = "" if given is None else given.decode("latin-1")
    return text if _IDENTIFIER.fullmatch(text) else uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The span of a caller (W3C Trace Context)."""

    trace_id: str
    """32 hexadecimal digits, by which logs of several services are joined."""

    span_id: str
    """16 hexadecimal digits."""

    is_sampled: bool
    """Whether the caller records its trace."""


def trace_parent_of(scope: Scope) -> TraceParent | None:
    """The caller's span from a W3C ``traceparent``; None without a valid one."""
    for name, value in scope["headers"]:
        if name == b"traceparent":
            found = _TRACEPARENT.fullmatch(value.decode("latin-1"))
            return TraceParent(found[1], found[2], bool(int(found[3], 16) & _SAMPLED)) if found else None
    return None


def run_id_of(request: Request) -> str | None:
    """The training run of a request, from ``X-Run-Id``; None without the header.

    Raises:
        InvalidRequest: the header is not an identifier of 1 to 128 permitted characters.
    """
    given = request.headers.get("X-Run-Id")
    if given is not None and not _IDENTIFIER.fullmatch(given):
        raise InvalidRequest("X-Run-Id must be 1 to 128 of A-Z a-z 0-9 _ . : -")
    return given


def nonce_of(request: Request) -> str | None:
    """The number, used once, with which the answer is signed; None: no signature is asked for.

    Raises:
        InvalidRequest: it is malformed.
    """
    given = request.headers.get(NONCE_HEADER)
    if given is None:
        return None
    if not NONCE.fullmatch(given):
        raise InvalidRequest(f"{NONCE_HEADER} must be 16 to 64 of A-Z a-z 0-9 _ -")
    return given
