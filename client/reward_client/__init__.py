"""Client of the reward-model service for RL training loops: one reward per completion, or an exception.

It depends on httpx2 and tenacity alone, so that it can be installed into any training environment. The exceptions are
in ``reward_client.errors``. Retries are records of the logger ``reward_client``; a program that does not set logging up
sees none of them.
"""

import logging

from reward_client.answers import Comparison, ScoredItem
from reward_client.asynchronous import AsyncRewardClient
from reward_client.diagnostics import Diagnostics
from reward_client.models import ServedModel
from reward_client.references import ReferenceWarning
from reward_client.requests import ChunkLimits
from reward_client.retries import RetryPolicy
from reward_client.synchronous import RewardClient

__version__ = "0.1.0"

__all__ = [
    "AsyncRewardClient",
    "ChunkLimits",
    "Comparison",
    "Diagnostics",
    "ReferenceWarning",
    "RetryPolicy",
    "RewardClient",
    "ScoredItem",
    "ServedModel",
]

logging.getLogger("reward_client").addHandler(logging.NullHandler())
