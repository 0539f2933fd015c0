"""The client for RL loops: texts in, one true reward each out, or an exception; never an invented number.

It stands on records, errors and provenance alone and imports neither torch, ray nor numpy, so a trainer can install it
beside pins of its own. What it raises is in ``service.errors``.
"""

from service.client.answers import Comparison, ScoredItem
from service.client.asynchronous import AsyncRewardClient
from service.client.references import ReferenceWarning
from service.client.requests import ChunkLimits
from service.client.retries import RetryPolicy
from service.client.synchronous import RewardClient

__all__ = [
    "AsyncRewardClient",
    "ChunkLimits",
    "Comparison",
    "ReferenceWarning",
    "RetryPolicy",
    "RewardClient",
    "ScoredItem",
]
