"""The client for RL loops: texts in, one true reward each out, or an exception; never an invented number.

It needs httpx2 and stamina alone, so a trainer can install it beside pins of its own. What it raises is in
``reward_client.errors``.
"""

from reward_client.answers import Comparison, ScoredItem
from reward_client.asynchronous import AsyncRewardClient
from reward_client.references import ReferenceWarning
from reward_client.requests import ChunkLimits
from reward_client.retries import RetryPolicy
from reward_client.synchronous import RewardClient

__all__ = [
    "AsyncRewardClient",
    "ChunkLimits",
    "Comparison",
    "ReferenceWarning",
    "RetryPolicy",
    "RewardClient",
    "ScoredItem",
]
