"""How many replicas the waiting work needs: the policy for Ray Serve's autoscaler.

Ray carries this module to its controller by value, so it imports nothing of the service and nothing of Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

QUEUE_S = "queue_s"
"""Statistic of a replica: seconds of engine time that wait in its queue."""
BUSY = "busy"
"""Statistic of a replica: the fraction of time for which its engine runs batches, 0 to 1."""


class Context(Protocol):
    """What the policy reads of Ray's AutoscalingContext."""

    current_num_replicas: int
    target_num_replicas: int

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None:
        """By name the statistic of each replica, its mean over ``look_back_period_s``."""
        ...


class QueuedTokensPolicy:
    """As many replicas as compute the waiting tokens in ``target_queue_s`` and are busy for ``target_busy`` at most.

    desired = max(sum of queue_s / target_queue_s, sum of busy / target_busy), rounded up by Ray. The queue is counted
    in seconds of engine time, tokens divided by the measured tokens per second, so the same target fits every model and
    device. A request counts by its tokens, and not as one.

    Args:
        target_queue_s: seconds of work that may wait for each replica.
        target_busy: fraction of time for which an engine may be busy, above 0 and up to 1.
    """

    def __init__(self, target_queue_s: float = 2.0, target_busy: float = 0.8) -> None:
        if not target_queue_s > 0 or not 0 < target_busy <= 1:
            raise ValueError("target_queue_s must be above 0, and target_busy above 0 and at most 1")
        self._target_queue_s = target_queue_s
        self._target_busy = target_busy

    def __call__(self, context: Context) -> tuple[float, dict[str, Any]]:
        """Return the desired number of replicas, which Ray bounds and delays as configured; and no state."""
        metrics = context.aggregated_metrics or {}
        if QUEUE_S not in metrics or BUSY not in metrics:  # nothing was reported yet
            return context.target_num_replicas, {}
        waiting = sum(metrics[QUEUE_S].values()) / self._target_queue_s
        busy = sum(metrics[BUSY].values()) / self._target_busy
        return max(1, math.ceil(max(waiting, busy) - 1e-9)), {}
