"""Reward classes for ms-swift's GRPO: registered in ``swift.rewards.orms`` by an external plugin.

    # plugin.py, given as --external_plugins plugin.py --reward_funcs remote_reward
    from functools import partial
    from reward_client.adapters.ms_swift import AsyncRemoteORM
    from swift.rewards import orms

    orms["remote_reward"] = partial(AsyncRemoteORM, url="http://127.0.0.1:8000")

Without ``url`` the options are those of the environment (``REMOTE_REWARD_URL`` and so on). ms-swift passes the
completions as strings and the conversations, completion included, as ``messages``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reward_client.adapters.options import read_options
from reward_client.asynchronous import AsyncRewardClient
from reward_client.errors import InvalidArgument
from reward_client.requests import ChatMessage
from reward_client.synchronous import RewardClient

WHERE = "url=, or REMOTE_REWARD_URL in the environment of the trainer"


class RemoteORM:
    """A synchronous outcome reward.

    Args:
        args: the arguments of the training, which ms-swift passes; ignored.
        options: ``url``, ``truncation``, ``template`` and the options of ``RewardClient``; they take precedence over
            the environment.

    Raises:
        InvalidArgument: no URL, or an option is wrong.
    """

    def __init__(self, args: Any = None, **options: Any) -> None:  # noqa: ARG002 - the signature of ms-swift
        read = read_options(options, WHERE)
        self.score_options = read.score
        self.client = RewardClient(read.url, **read.client)

    def __call__(
        self, completions: Sequence[str], messages: Sequence[Sequence[ChatMessage]] | None = None, **_: Any
    ) -> list[float]:
        """Return the raw reward of each completion, in order.

        Raises:
            ClientError: see ``AsyncRewardClient.score``.
        """
        return self.client.score(*_exchanges(completions, messages), **self.score_options)


class AsyncRemoteORM:
    """An asynchronous outcome reward, which ms-swift runs at the same time as others; arguments of ``RemoteORM``."""

    def __init__(self, args: Any = None, **options: Any) -> None:  # noqa: ARG002 - the signature of ms-swift
        read = read_options(options, WHERE)
        self.score_options = read.score
        self.client = AsyncRewardClient(read.url, **read.client)

    async def __call__(
        self, completions: Sequence[str], messages: Sequence[Sequence[ChatMessage]] | None = None, **_: Any
    ) -> list[float]:
        """Return the raw reward of each completion, in order; see ``RemoteORM``."""
        try:
            return await self.client.score(*_exchanges(completions, messages), **self.score_options)
        finally:
            await self.client.aclose()  # ms-swift runs every call on a new event loop


def _exchanges(
    completions: Sequence[str], messages: Sequence[Sequence[ChatMessage]] | None
) -> tuple[list[Sequence[ChatMessage]], list[str]]:
    """Return prompts and completions; the last message of each conversation is its completion."""
    if messages is None:
        raise InvalidArgument("ms-swift passed no messages; a reward model needs the prompts")
    if len(messages) != len(completions):
        raise InvalidArgument(f"{len(completions)} completions, but {len(messages)} conversations")
    return [conversation[:-1] for conversation in messages], list(completions)
