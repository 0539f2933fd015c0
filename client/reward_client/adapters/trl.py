"""Reward functions for the trainers of TRL (GRPO, RLOO and those that take the same functions).

TRL calls them with keyword arguments and awaits them if ``__call__`` is a coroutine function, so there is a class for
each. It sets no timeout and retries nothing; the client does both. None would be left out of the sum without an error,
so it is never returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from reward_client.adapters.columns import KEY_PREFIX, column_values, columns_in, mean_of_known
from reward_client.adapters.options import ClientOptions, ScoreOptions
from reward_client.answers import ScoredItem
from reward_client.asynchronous import AsyncRewardClient
from reward_client.checks import one_of
from reward_client.options import DiagnosticsLevel, TemplateChoice, Truncation
from reward_client.requests import Completion, Prompt
from reward_client.synchronous import RewardClient

METRIC_PREFIX = "reward_model/"
"""Put in front of a column's name in metrics."""


LogExtra = Callable[[str, list[Any]], None]
"""TRL's ``log_extra``: adds a column with one value per completion to the table of completions."""

LogMetric = Callable[[str, float], None]
"""TRL's ``log_metric``: logs a number under a name, averaged over a logging step."""


class _Settings:
    """What both classes have in common: their options, and how diagnostics are logged."""

    def __init__(
        self,
        diagnostics: DiagnosticsLevel,
        truncation: Truncation | None,
        template: TemplateChoice | None,
        name: str | None,
    ) -> None:
        one_of(diagnostics, "diagnostics", ("none", "basic", "full"))
        self.diagnostics: DiagnosticsLevel = diagnostics
        self.score_options = ScoreOptions(truncation=truncation, template=template)
        self.__name__ = type(self).__name__ if name is None else name

    def _log(
        self, items: Sequence[ScoredItem], log_metric: LogMetric | None, log_extra: LogExtra | None
    ) -> list[float]:
        # A column is logged even where all its values are unknown: the columns of TRL's table must have equal length.
        for name, values in column_values(items, columns_in(self.diagnostics)).items():
            if log_extra is not None:
                log_extra(KEY_PREFIX + name, values)
            mean = mean_of_known(values)
            if log_metric is not None and mean is not None:
                log_metric(METRIC_PREFIX + name, mean)
        return [item.known_reward for item in items]


class RemoteReward(_Settings):
    """A synchronous reward function.

    Args:
        url: the root URL of the service.
        diagnostics: which diagnostics are asked for and logged.
        truncation: what happens to an item that is too long; None: the service's setting.
        template: how a plain-text prompt is rendered; None: the service's setting. TRL's own reward models read prompt
            and completion joined, which is ``concat``.
        name: the name under which TRL logs the reward; None: the name of the class.
        options: those of ``RewardClient``.

    Raises:
        InvalidArgument: see ``RewardClient``.
    """

    def __init__(
        self,
        url: str,
        *,
        diagnostics: DiagnosticsLevel = "full",
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        name: str | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        super().__init__(diagnostics, truncation, template, name)
        self.client = RewardClient(url, **options)

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        log_metric: LogMetric | None = None,
        log_extra: LogExtra | None = None,
        **_: Any,
    ) -> list[float]:
        """Return the raw reward of each completion, in order, and log the diagnostics.

        Args:
            prompts: texts or conversations.
            completions: texts or lists of messages, one for each prompt.
            log_metric: TRL's, which gets the mean of each diagnostic over the items where it is known.
            log_extra: TRL's, which gets each diagnostic with one value per completion.

        Raises:
            ClientError: see ``AsyncRewardClient.score``.
        """
        items = self.client.score(prompts, completions, diagnostics=self.diagnostics, **self.score_options)
        return self._log(items, log_metric, log_extra)


class AsyncRemoteReward(_Settings):
    """An asynchronous reward function, which TRL runs at the same time as others; arguments of ``RemoteReward``."""

    def __init__(
        self,
        url: str,
        *,
        diagnostics: DiagnosticsLevel = "full",
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        name: str | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        super().__init__(diagnostics, truncation, template, name)
        self.client = AsyncRewardClient(url, **options)

    async def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        log_metric: LogMetric | None = None,
        log_extra: LogExtra | None = None,
        **_: Any,
    ) -> list[float]:
        """Return the raw reward of each completion, in order, and log the diagnostics; see ``RemoteReward``."""
        items = await self.client.score(prompts, completions, diagnostics=self.diagnostics, **self.score_options)
        return self._log(items, log_metric, log_extra)
