"""Routes for whoever operates the service: what is served, liveness, readiness, metrics, schemas."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TypeAlias

import msgspec
from reward_client.provenance import check_reference
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.assembly import ServedModel
from service.errors import Draining, InvalidRequest, NotReady
from service.http import openapi
from service.protocols.native import MAX_NAME_CHARS
from service.protocols.registry import enabled_protocols

Exposition: TypeAlias = Callable[[], Awaitable[str]]
"""Collects the metrics of all replicas, in Prometheus' text format."""

JSON = "application/json"
METRICS_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operating_routes(served: ServedModel, exposition: Exposition) -> list[Route]:
    """The routes ``/v1/model``, ``/livez``, ``/readyz``, ``/metrics`` and ``/openapi.json``, and aliases of two.

    ``/healthz`` is liveness, as it was in Kubernetes; ``/health`` is readiness, as it is in other model servers.
    """
    schema = msgspec.json.encode(openapi.document(enabled_protocols(served.settings.protocols)))

    async def live(_: Request) -> Response:
        return Response(b'{"status":"alive"}', media_type=JSON)

    async def ready(_: Request) -> Response:
        served.scorer.check_health()
        state = served.scorer.state
        if state == "draining":
            raise Draining("This replica takes no new requests")
        if state != "ready":
            raise NotReady("The model is loading or warming up")
        return Response(b'{"status":"ready"}', media_type=JSON)

    async def metrics(_: Request) -> Response:
        return Response(await exposition(), headers={"Content-Type": METRICS_MEDIA_TYPE})

    async def schemas(_: Request) -> Response:
        return Response(schema, media_type=JSON)

    return [
        _model_route(served),
        Route("/livez", live),
        Route("/healthz", live),
        Route("/readyz", ready),
        Route("/health", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", schemas),
    ]


def _model_route(served: ServedModel) -> Route:
    description = served.description()
    encoded_description = msgspec.json.encode(description)
    origin = served.origin

    async def model(request: Request) -> Response:
        reference = request.query_params.get("reference")
        if reference is None:
            return Response(encoded_description, media_type=JSON)
        if not 0 < len(reference) <= MAX_NAME_CHARS:
            raise InvalidRequest(f"The reference must have 1 to {MAX_NAME_CHARS} characters")
        answer = description | {"reference": asdict(check_reference(origin, reference))}
        return Response(msgspec.json.encode(answer), media_type=JSON)

    return Route("/v1/model", model)
