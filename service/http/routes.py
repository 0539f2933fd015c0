"""The ASGI application of one replica, made of the routes and the middleware around them. It needs no Ray."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware

from service.api_keys import ApiKeys
from service.assembly import ServedModel
from service.errors import Overloaded
from service.http.access_log import AccessLog
from service.http.authentication import Authentication
from service.http.body_budget import BodyBudget
from service.http.edit import edit_route
from service.http.loop_load import LoopLoad
from service.http.middleware import RequestMiddleware
from service.http.monitoring import GatherMonitors, monitor_route
from service.http.open_requests import OpenRequests
from service.http.operating import Exposition, operating_routes
from service.http.page_routes import FILES, page_routes
from service.http.problems import EXCEPTION_HANDLERS
from service.http.protocols import protocol_routes
from service.http.scoring import scoring_routes
from service.http.style import style_route
from service.http.tracing import RequestTracer
from service.http.unread_refusals import UnreadRefusals


def create_app(
    served: ServedModel,
    exposition: Exposition,
    access_log: AccessLog,
    open_requests: OpenRequests,
    *,
    monitors: GatherMonitors | None = None,
    api_keys: ApiKeys | None = None,
    host_echoes_request_id: bool = False,
    livez_checks_engine: bool = False,
    tracer: RequestTracer | None = None,
) -> Starlette:
    """Build the application that answers for one replica.

    Args:
        served: the model and its scorer; started and stopped by the caller.
        exposition: what ``/metrics`` answers.
        access_log: where request lines go; closed by the caller.
        open_requests: counts requests in and out.
        monitors: what ``/v1/monitor`` answers; None: this replica alone.
        api_keys: who may call; None: everybody.
        host_echoes_request_id: whether the server of the application adds ``X-Request-Id`` to answers itself, as Ray
            does.
        livez_checks_engine: whether ``/livez`` fails once the engine has died; where the process has to be restarted
            then. Ray replaces the replica instead.
        tracer: makes traces of requests; closed by the caller. None: there are none.
    """
    routes = [
        *scoring_routes(served),
        style_route(served),
        edit_route(served),
        *operating_routes(served, exposition, livez_checks_engine=livez_checks_engine),
        monitor_route(served, monitors),
        *protocol_routes(served),
        *(page_routes() if served.settings.page.enabled else ()),
    ]
    # An alias has the endpoint of the route that it stands for, which is listed before it and named in logs.
    path_of = {route.endpoint: route.path for route in reversed(routes)}
    refusals = UnreadRefusals(
        LoopLoad(open_requests),
        served.metrics,
        access_log,
        model_version=served.identity.version,
        route_names={route.path: path_of[route.endpoint] for route in routes},
        echoes_request_id=not host_echoes_request_id,
    )
    request_middleware = Middleware(
        RequestMiddleware,
        model_version=served.identity.version,
        metrics=served.metrics,
        access_log=access_log,
        open_requests=open_requests,
        path_of=path_of,
        echoes_request_id=not host_echoes_request_id,
        body_budget=BodyBudget(
            served.settings.limits.max_open_body_bytes, served.metrics.shed.labels(reason=Overloaded.code).inc
        ),
        tracer=tracer,
        refusals=refusals,
    )
    app = Starlette(
        routes=routes,
        middleware=[request_middleware, *_authentication(served, api_keys)],
        exception_handlers=EXCEPTION_HANDLERS,
    )
    app.router.redirect_slashes = False
    app.state.unread_refusals = refusals  # for a server that can refuse before it makes a request of the bytes
    return app


def _authentication(served: ServedModel, keys: ApiKeys | None) -> list[Middleware]:
    if keys is None:
        return []
    settings = served.settings
    return [
        Middleware(
            Authentication,
            keys=keys,
            metrics=served.metrics,
            public_metrics=settings.security.public_metrics,
            open_paths=FILES if settings.page.enabled else (),  # they hold no data
        )
    ]
