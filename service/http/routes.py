"""The ASGI application of one replica, made of the routes and the middleware around them. It needs no Ray."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware

from service.assembly import ServedModel
from service.http.access_log import AccessLog
from service.http.middleware import RequestMiddleware
from service.http.monitoring import GatherMonitors, monitor_route
from service.http.open_requests import OpenRequests
from service.http.operating import Exposition, operating_routes
from service.http.problems import EXCEPTION_HANDLERS
from service.http.protocols import protocol_routes
from service.http.scoring import scoring_routes


def create_app(
    served: ServedModel,
    exposition: Exposition,
    access_log: AccessLog,
    open_requests: OpenRequests,
    *,
    monitors: GatherMonitors | None = None,
    host_echoes_request_id: bool = False,
) -> Starlette:
    """Build the application that answers for one replica.

    Args:
        served: the model and its scorer; started and stopped by the caller.
        exposition: what ``/metrics`` answers.
        access_log: where request lines go; closed by the caller.
        open_requests: counts requests in and out.
        monitors: what ``/v1/monitor`` answers; None: this replica alone.
        host_echoes_request_id: whether the server of the application adds ``X-Request-Id`` to answers itself, as Ray
            does.
    """
    routes = [
        *scoring_routes(served),
        *operating_routes(served, exposition),
        monitor_route(served, monitors),
        *protocol_routes(served),
    ]
    middleware = Middleware(
        RequestMiddleware,
        model_version=served.identity.version,
        metrics=served.metrics,
        access_log=access_log,
        open_requests=open_requests,
        # An alias has the endpoint of the route that it stands for, which is listed before it and named in logs.
        path_of={route.endpoint: route.path for route in reversed(routes)},
        echoes_request_id=not host_echoes_request_id,
    )
    app = Starlette(routes=routes, middleware=[middleware], exception_handlers=EXCEPTION_HANDLERS)
    app.router.redirect_slashes = False
    return app
