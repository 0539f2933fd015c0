"""Client of the reward-model service for RL training loops: one reward per completion, or an exception.

It depends on httpx2 and stamina alone, so that it can be installed into any training environment. The exceptions are in
``reward_client.errors``.
"""

from reward_client.answers import Comparison, ScoredItem
from reward_client.asynchronous import AsyncRewardClient
from reward_client.references import ReferenceWarning
from reward_client.requests import ChunkLimits
from reward_client.retries import RetryPolicy
from reward_client.synchronous import RewardClient

__version__ = "0.1.0"

__all__ = [
    "AsyncRewardClient",
    "ChunkLimits",
    "Comparison",
    "ReferenceWarning",
    "RetryPolicy",
    "RewardClient",
    "ScoredItem",
]
