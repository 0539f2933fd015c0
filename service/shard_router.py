"""Ray Serve's request router of the deployment: sends a shard to the replica that it is meant for.

Ray carries this module to other processes by value, so it imports nothing of the service.
"""

from __future__ import annotations

import random

from ray.serve.request_router import (
    LocalityMixin,
    MultiplexMixin,
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

REPLICA_ARGUMENT = "replica"
"""The keyword argument of a call that names the replica to send it to."""


class ShardRouter(LocalityMixin, MultiplexMixin, RequestRouter):  # type: ignore[misc]  # Ray's mixins are untyped
    """Routes a call that names a replica to that one, and every other call to the less loaded of two random ones.

    A call for a replica that has gone is routed like any other: all replicas can compute any shard, and a replica of
    another build refuses it. Unlike Ray's default router, which fulfils calls in order of arrival with whatever replica
    is found first, this one keeps each call on the replicas that were chosen for it.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas of which Ray takes the one with the fewest ongoing calls."""
        name = pending_request.kwargs.get(REPLICA_ARGUMENT) if pending_request is not None else None
        if name is not None:
            named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == name]
            if named:
                return [named]
        near = self.apply_locality_routing(pending_request)
        chosen = random.sample(sorted(near, key=str), min(2, len(near)))
        return [[self.curr_replicas[replica_id] for replica_id in chosen]]
