"""What comes before Ray Serve: the headers of a client that it reads, and refusals under overload.

It gets an id that can be logged, and no header that steers it. What Ray does for a request takes longer than a refusal,
so requests that are refused before they are read do not reach it.

Ray's HTTP servers decode ``X-Request-Id`` as UTF-8, answer 500 where that fails, and echo an id that cannot be logged.
They let a client switch off its own cancellation and the timeout of its request, name a model or a session, and decode
those headers too. They wrap the application, so only a middleware that they run themselves comes first: the environment
variable ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names `proxy_middlewares`.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.facts import request_id_of
from service.http.unread_refusals import Gate

REQUEST_ID = b"x-request-id"
STEERING = frozenset(
    {b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve-multiplexed-model-id", b"x-session-id"}
)
"""Headers by which a client would steer Ray, with hyphens for underscores; the service has none of their features."""
DECODED = frozenset({b"traceparent", b"tracestate"})
"""Headers that Ray decodes as UTF-8."""


GATE = Gate()
"""Of the replica in this process, which opens it; Ray makes the middleware itself and passes it nothing."""


class RayHeadersMiddleware:
    """ASGI middleware that removes what steers Ray or cannot be decoded, and replaces an invalid ``X-Request-Id``.

    Under overload it refuses requests for the routes of an application without a prefix.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            refusals = GATE.refusals
            if refusals is not None and scope["method"] == "POST" and refusals.has_route(scope["path"]):
                refusal = refusals.refusal()
                if refusal is not None:
                    await refusals.answer(refusal, scope, send, is_before_host=True)
                    return
            request_id = request_id_of(scope)
            others = [(name, value) for name, value in scope["headers"] if _passes(name, value)]
            scope["headers"] = [*others, (REQUEST_ID, request_id.encode())]
        await self._app(scope, receive, send)


def _passes(name: bytes, value: bytes) -> bool:
    """Whether Ray gets a header as it came."""
    if not name.isascii() or name == REQUEST_ID or name.replace(b"_", b"-") in STEERING:
        return False
    return name not in DECODED or value.isascii()


def proxy_middlewares() -> list[Middleware]:
    """Return what Ray's HTTP servers run before anything of theirs; Ray calls this when it starts one."""
    return [Middleware(RayHeadersMiddleware)]
