"""Client of the reward-model service for RL training loops: one reward per completion, or an exception.

It depends on httpx2 and tenacity alone, so that it can be installed into any training environment. The exceptions are
in ``reward_client.errors``. Retries are records of the logger ``reward_client``; a program that does not set logging up
sees none of them.

The names of this package are imported at their first use: httpx2 and asyncio take longer to import than a command of
the service, which shares ``reward_client.errors``, takes to print its help.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING

from reward_client import errors as errors

if TYPE_CHECKING:
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

_MODULES = {
    "AsyncRewardClient": "asynchronous",
    "ChunkLimits": "requests",
    "Comparison": "answers",
    "Diagnostics": "diagnostics",
    "ReferenceWarning": "references",
    "RetryPolicy": "retries",
    "RewardClient": "synchronous",
    "ScoredItem": "answers",
    "ServedModel": "models",
}
"""The module of each name; a type checker reads the imports above instead."""

logging.getLogger("reward_client").addHandler(logging.NullHandler())


if not TYPE_CHECKING:  # for a type checker, a name that does not exist stays an error

    def __getattr__(name: str) -> object:
        """Import a name of this package at its first use (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module 'reward_client' has no attribute {name!r}")
        value = getattr(import_module(f"reward_client.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the names of this package, imported or not."""
    return sorted({*globals(), *__all__})
