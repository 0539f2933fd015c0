"""``GET /v1/monitor``: the rolling monitors of all scored items, or of one run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.assembly import ServedModel
from service.diagnostics.monitors.monitor import MonitorView, describe_state
from service.errors import RunNotFound
from service.http.facts import run_id_of

GatherMonitors: TypeAlias = Callable[[str | None], Awaitable[MonitorView]]
"""Collects the state of the monitors of all replicas: of all items, or of the run with the given id."""


def monitor_route(served: ServedModel, gather: GatherMonitors | None) -> Route:
    """The route; without ``gather`` it reports this replica alone."""

    async def of_this_replica(run_id: str | None) -> MonitorView:
        return served.monitors.view(run_id)

    collect = gather or of_this_replica

    async def monitor(request: Request) -> Response:
        run_id = run_id_of(request)
        view = await collect(run_id)
        if view.state is None:
            raise RunNotFound(f"The monitors have no items of this run; they have {len(view.runs)} other runs")
        answer = {
            "model": {"name": served.identity.name, "version": served.identity.version},
            "run": run_id,
            "runs": view.runs,
            "incomplete": view.incomplete,
            "calibrated": served.monitors.reference is not None,
        }
        state = describe_state(view.state, served.monitors.reference, served.settings.monitors, served.info.outputs)
        return Response(msgspec.json.encode(answer | state), media_type="application/json")

    return Route("/v1/monitor", monitor)
