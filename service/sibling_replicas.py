"""The other replicas of the application, reached through Ray Serve's handle to the deployment itself."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from service.errors import HttpError
from service.request_shard import RequestShard, ShardResult
from service.scheduling.scatter import ReplicaLoad

logger = logging.getLogger(__name__)

LOADS_TIMEOUT_S = 0.5
"""Seconds to wait for the loads of all replicas; afterwards the last known ones are used."""
LOADS_FRESH_S = 1.0
"""Seconds for which the loads of few replicas are not asked for again."""
LOADS_PER_S = 16
"""With many replicas the loads are asked for less often, so that each replica makes at most so many calls a second."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a replica answers when it is asked for its load."""

    name: str
    build: str
    waiting_tokens: int
    accepts: bool
    """Whether it takes shards."""


class SiblingReplicas:
    """Satisfies `service.scattering.Siblings` with the replicas of the deployment that this process is a replica of.

    Args:
        build: model version and code of this replica; replicas of another build are left out.
    """

    def __init__(self, build: str) -> None:
        context = serve.get_replica_context()
        self._build = build
        self._name = context.replica_tag
        self._handle: DeploymentHandle[Any] = serve.get_deployment_handle(context.deployment, context.app_name)
        self._loads: tuple[ReplicaLoad, ...] = ()
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()

    async def call_all(self, method: str, *arguments: Any, timeout_s: float) -> tuple[list[Any], bool]:
        """Call a method of every replica; return the results, and whether some are missing."""
        try:
            answers = await self._handle.broadcast(method, *arguments).results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except (TimeoutError, RayServeException):
            return [], True
        results = [answer for answer in answers if not isinstance(answer, BaseException)]
        return results, len(results) < len(answers)

    async def loads(self) -> Sequence[ReplicaLoad]:
        """Return the load of each sibling of the same build that accepts shards; it may be some seconds old."""
        async with self._asking:
            fresh_s = max(LOADS_FRESH_S, len(self._loads) / LOADS_PER_S)
            if time.monotonic() - self._asked_at > fresh_s:
                reports, _ = await self.call_all("load", timeout_s=LOADS_TIMEOUT_S)
                if reports:
                    self._loads = tuple(self._siblings_among(reports))
                self._asked_at = time.monotonic()
        return self._loads

    async def compute(self, name: str, shard: RequestShard) -> ShardResult:
        """Let a sibling compute a shard, as `Siblings.compute`."""
        # Ray gives all calls that are made while it handles one HTTP request the id of that request, and its router,
        # which finds a waiting call by this id, would forget all but one of several shards. Outside of the context of
        # the request each call gets an id of its own.
        return await asyncio.create_task(self._call(name, shard), context=contextvars.Context())

    async def _call(self, name: str, shard: RequestShard) -> ShardResult:
        # Every replica announces its name as the id of a model that it alone has, so Ray sends the call there. Where
        # that replica has gone, or its queue does not answer, another one gets it: all can compute any shard.
        response = self._handle.options(method_name="compute_shard", multiplexed_model_id=name).remote(shard)
        try:
            answer: ShardResult | HttpError = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        if isinstance(answer, HttpError):
            raise answer
        return answer

    def _siblings_among(self, reports: Sequence[LoadReport]) -> list[ReplicaLoad]:
        return [
            ReplicaLoad(report.name, report.waiting_tokens)
            for report in reports
            if report.accepts and report.build == self._build and report.name != self._name
        ]
