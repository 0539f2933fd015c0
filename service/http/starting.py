"""The application while the model loads: alive, not ready, and every other route but the page answers ``not_ready``.

It needs no model, so the server can listen before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.errors import NotReady
from service.http import openapi
from service.http.access_log import AccessLog
from service.http.middleware import RequestMiddleware
from service.http.open_requests import OpenRequests
from service.http.page_routes import page_routes
from service.http.problems import EXCEPTION_HANDLERS
from service.metrics import Metrics

LIVENESS = frozenset({"/livez", "/healthz"})


def create_starting_app(access_log: AccessLog, open_requests: OpenRequests, *, page: bool) -> Starlette:
    """Build the application that answers until the model is loaded; it has the routes of the OpenAPI document.

    Args:
        access_log: where request lines go; closed by the caller.
        open_requests: counts requests in and out.
        page: whether the page is served, which then waits for the model.
    """
    routes = [
        Route(path, _live() if path in LIVENESS else _not_ready(), methods=[name.upper() for name in operations])
        for path, operations in openapi.document()["paths"].items()
    ]
    routes += page_routes() if page else []
    middleware = Middleware(
        RequestMiddleware,
        model_version=None,
        metrics=Metrics(),  # those of the model do not exist yet; nothing reads these
        access_log=access_log,
        open_requests=open_requests,
        path_of={route.endpoint: route.path for route in routes},
        echoes_request_id=True,
    )
    app = Starlette(routes=routes, middleware=[middleware], exception_handlers=EXCEPTION_HANDLERS)
    app.router.redirect_slashes = False
    return app


# A new function for each route: the access log and the metrics find the route of a request by its function.


def _live() -> Callable[[Request], Awaitable[Response]]:
    async def live(_: Request) -> Response:
        return Response(b'{"status":"alive"}', media_type="application/json")

    return live


def _not_ready() -> Callable[[Request], Awaitable[Response]]:
    async def refuse(_: Request) -> Response:
        raise NotReady("The model is loading or warming up")

    return refuse
