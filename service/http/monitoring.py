"""``GET /v1/monitor``: the rolling monitors of all scored items, or of one run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service.assembly import ServedModel
from service.diagnostics.monitors.distributions import describe_distributions
from service.diagnostics.monitors.monitor import MonitorView, describe_state
from service.diagnostics.paying import mark_paying
from service.errors import Forbidden, RunNotFound
from service.http.facts import facts_of, run_id_of

GatherMonitors: TypeAlias = Callable[[str | None], Awaitable[MonitorView]]
"""Collects the state of the monitors of all replicas: of all items, or of the run with the given id."""


def monitor_route(served: ServedModel, gather: GatherMonitors | None) -> Route:
    """The route; without ``gather`` it reports this replica alone."""

    async def of_this_replica(run_id: str | None) -> MonitorView:
        return served.monitors.view(run_id)

    collect = gather or of_this_replica

    async def monitor(request: Request) -> Response:
        run_id = run_id_of(request)
        if run_id is None and not facts_of(request).is_admin:
            raise Forbidden("All runs together need a key with scope admin; name a run with X-Run-Id")
        view = await collect(run_id)
        if view.state is None:
            raise RunNotFound(f"The monitors have no items of this run; they have {len(view.runs)} other runs")
        answer = {
            "model": {"name": served.identity.name, "version": served.identity.version},
            "run": run_id,
            "runs": view.runs if facts_of(request).is_admin else (),
            "incomplete": view.incomplete,
            "calibrated": served.monitors.reference is not None,
        }
        monitors = served.monitors
        calibration = served.lookup.calibration
        state = mark_paying(
            describe_state(view.state, monitors.reference, monitors.settings, served.info.outputs, monitors.subject),
            None if calibration is None else calibration.probe,
        )
        rewards = None if calibration is None else calibration.rewards
        distributions = {
            "distributions": describe_distributions(view.state.items, rewards, served.settings.diagnostics.alpha)
        }
        return Response(msgspec.json.encode(answer | state | distributions), media_type="application/json")

    return Route("/v1/monitor", monitor)
