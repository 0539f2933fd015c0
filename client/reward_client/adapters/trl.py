"""Reward functions for the trainers of TRL (GRPO, RLOO and those that take the same functions).

TRL calls them with keyword arguments and awaits them if ``__call__`` is a coroutine function, so there is a class for
each. It sets no timeout and retries nothing; the client does both. None would be left out of the sum without an error,
so it is never returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

from reward_client.adapters.columns import KEY_PREFIX, column_values, columns_in, mean_of_known, named_reward
from reward_client.adapters.options import ClientOptions, ScoreOptions
from reward_client.answers import ScoredItem
from reward_client.asynchronous import AsyncRewardClient
from reward_client.checks import elements, one_of
from reward_client.errors import InvalidArgument
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

    def log(self, items: Sequence[ScoredItem], log_metric: LogMetric | None, log_extra: LogExtra | None) -> None:
        """Log the diagnostics of a batch."""
        # A column is logged even where all its values are unknown: the columns of TRL's table must have equal length.
        for name, values in column_values(items, columns_in(self.diagnostics)).items():
            if log_extra is not None:
                log_extra(KEY_PREFIX + name, values)
            mean = mean_of_known(values)
            if log_metric is not None and mean is not None:
                log_metric(METRIC_PREFIX + name, mean)

    def _rewards(
        self, items: Sequence[ScoredItem], log_metric: LogMetric | None, log_extra: LogExtra | None
    ) -> list[float]:
        self.log(items, log_metric, log_extra)
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
        return self._rewards(items, log_metric, log_extra)


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
        return self._rewards(items, log_metric, log_extra)


class RemoteRewards:
    """The outputs of a model with several, as one synchronous reward function for each.

    TRL takes a list of reward functions, weighs them by ``reward_weights`` of its configuration and, with
    ``multi_objective_aggregation="normalize_then_sum"``, normalises each within its group first (GDPO). TRL calls the
    functions one after the other with the same batch; the first call scores it and the others take its outputs, so that
    a batch is scored once. ``functions`` is passed as ``reward_funcs``.

    Args:
        url: the root URL of the service.
        names: names of the outputs, in the order of the functions; ``/v1/model`` lists those of the model.
        diagnostics: which diagnostics are asked for and logged, by the first function.
        truncation: what happens to an item that is too long; None: the service's setting.
        template: how a plain-text prompt is rendered; None: the service's setting.
        options: those of ``RewardClient``.

    Raises:
        InvalidArgument: there is no name or one twice; see also ``RewardClient``.
    """

    def __init__(
        self,
        url: str,
        names: Sequence[str],
        *,
        diagnostics: DiagnosticsLevel = "full",
        truncation: Truncation | None = None,
        template: TemplateChoice | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        checked = elements(names, "names", "names of outputs")
        if not checked or len(set(checked)) != len(checked):
            raise InvalidArgument("names must have at least one name of an output, and each once")
        self._batch = RemoteReward(url, diagnostics=diagnostics, truncation=truncation, template=template, **options)
        self._scored: tuple[list[Prompt], list[Completion], list[ScoredItem]] | None = None
        self.functions = tuple(OutputReward(self, str(name), logs=index == 0) for index, name in enumerate(checked))
        """One for each name, in order."""

    @property
    def client(self) -> RewardClient:
        """The client of the service."""
        return self._batch.client

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[ScoredItem]:
        """Return the items of a batch; that of the last call is not scored again.

        Raises:
            ClientError: see ``AsyncRewardClient.score``.
        """
        batch = list(prompts), list(completions)
        if self._scored is None or self._scored[:2] != batch:
            settings = self._batch
            items = settings.client.score(*batch, diagnostics=settings.diagnostics, **settings.score_options)
            self._scored = (*batch, items)
        return self._scored[2]

    def log(self, items: Sequence[ScoredItem], log_metric: LogMetric | None, log_extra: LogExtra | None) -> None:
        """Log the diagnostics of a batch."""
        self._batch.log(items, log_metric, log_extra)


class OutputReward:
    """One output of a ``RemoteRewards``; TRL logs it under the output's name."""

    def __init__(self, rewards: RemoteRewards, name: str, *, logs: bool) -> None:
        self._rewards = rewards
        self._logs = logs
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        *,
        log_metric: LogMetric | None = None,
        log_extra: LogExtra | None = None,
        **_: Any,
    ) -> list[float]:
        """Return the raw output of each completion, in order.

        Raises:
            InvalidArgument: the model has no output of that name.
            ClientError: see ``AsyncRewardClient.score``.
        """
        items = self._rewards.score(prompts, completions)
        if self._logs:
            self._rewards.log(items, log_metric, log_extra)
        return [named_reward(item, self.__name__) for item in items]
