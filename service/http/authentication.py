"""Who may call which route: an ASGI middleware that denies every route except for those on a short list.

A key is presented as ``Authorization: Bearer KEY``, or as user name or password of HTTP Basic. The authentication
scheme is of RFC 9110, section 11, and RFC 6750.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api_keys import ApiKey, ApiKeys
from service.errors import Forbidden, HttpError, QuotaExceeded, Unauthenticated
from service.http.facts import RequestFacts
from service.http.problems import problem_response
from service.metrics import Metrics

PUBLIC_PATHS = frozenset({"/livez", "/healthz", "/readyz", "/health", "/v2/health/live", "/v2/health/ready"})
"""Probes: they need no key and say nothing about the model or its users."""
METRICS_PATH = "/metrics"
ADMIN_PATHS = frozenset({METRICS_PATH})
"""Routes that report on the requests of all callers."""


class Authentication:
    """ASGI middleware inside ``RequestMiddleware``, around all routes.

    Args:
        app: the application.
        keys: who may call.
        metrics: counts refusals.
        public_metrics: whether ``/metrics`` needs no key.
        open_paths: further routes that need no key.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        metrics: Metrics,
        public_metrics: bool,
        open_paths: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._public = PUBLIC_PATHS | ({METRICS_PATH} if public_metrics else set()) | set(open_paths)
        self._clock = clock
        self._quotas: dict[str, Quota] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or path_in_application(scope) in self._public:
            await self._app(scope, receive, send)
            return
        facts: RequestFacts = scope["state"]["facts"]
        try:
            key = self._admit(scope)
        except HttpError as error:
            self._metrics.authentication_failures.labels(reason=error.code).inc()
            await problem_response(error, facts)(scope, receive, send)
            return
        facts.key = key.name
        facts.is_admin = key.scope == "admin"
        facts.quota = self._quota_of(key)
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> ApiKey:
        """Return the key of a request that may pass.

        Raises:
            Unauthenticated, Forbidden: it may not.
        """
        presented = presented_keys(scope)
        if not presented:
            raise Unauthenticated("This service needs an API key; send Authorization: Bearer KEY")
        key = next(filter(None, map(self._keys.find, presented)), None)
        if key is None:
            raise Unauthenticated("The API key is not known here")
        if path_in_application(scope) in ADMIN_PATHS and key.scope != "admin":
            raise Forbidden("This route needs a key with scope admin")
        return key

    def _quota_of(self, key: ApiKey) -> Quota | None:
        if key.items_per_minute is None:
            return None
        return self._quotas.setdefault(key.name, Quota(key.items_per_minute, self._clock))


class Quota:
    """A token bucket of items: it holds at most one minute's worth, and a new one is full.

    Args:
        items_per_minute: how fast it fills.
        clock: seconds, monotonic.
    """

    def __init__(self, items_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = items_per_minute
        self._level = float(items_per_minute)
        self._clock = clock
        self._filled_at = clock()

    def take(self, num_items: int) -> None:
        """Take the items of one request; a request larger than the bucket passes when it is full.

        Raises:
            QuotaExceeded: the bucket does not hold them; nothing is taken.
        """
        now = self._clock()
        self._level = min(self._capacity, self._level + (now - self._filled_at) * self._capacity / 60)
        self._filled_at = now
        missing = min(num_items, self._capacity) - self._level
        if missing > 0:
            raise QuotaExceeded(
                f"The quota of this API key is {self._capacity} items a minute", missing * 60 / self._capacity
            )
        self._level -= num_items

    def give_back(self, num_items: int) -> None:
        """Give back what a request has taken that the service could not accept."""
        self._level = min(self._capacity, self._level + num_items)


def path_in_application(scope: Scope) -> str:
    """Return the path by which the routes are found: behind ``root_path``, where an application has a route prefix."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def presented_keys(scope: Scope) -> tuple[str, ...]:
    """Return the keys that a request presents: one with Bearer, user name and password with Basic, none otherwise."""
    header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, credentials = header.decode("latin-1").partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return (credentials,) if credentials else ()
    if scheme.lower() != "basic":
        return ()
    try:
        pair = base64.b64decode(credentials, validate=True).decode()
    except (binascii.Error, ValueError):
        return ()
    user, _, password = pair.partition(":")
    return tuple(filter(None, (password, user)))
