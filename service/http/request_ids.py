"""Gives a request an id before Ray Serve reads it.

Ray's HTTP servers decode ``X-Request-Id`` as UTF-8, answer 500 where that fails, and echo an id that cannot be logged.
They wrap the application, so only a middleware that they run themselves comes first: the environment variable
``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`` names `proxy_middlewares`.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from service.http.facts import request_id_of

HEADER = b"x-request-id"


class RequestIdMiddleware:
    """ASGI middleware that replaces an ``X-Request-Id`` that is absent or no identifier by a new random one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "http":
            request_id = request_id_of(scope)
            others = [(name, value) for name, value in scope["headers"] if name != HEADER]
            scope["headers"] = [*others, (HEADER, request_id.encode())]
        await self._app(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """Return what Ray's HTTP servers run before anything of theirs; Ray calls this when it starts one."""
    return [Middleware(RequestIdMiddleware)]
