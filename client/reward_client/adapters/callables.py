"""Plain reward functions, for frameworks and loops that call any Python function."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterable
from typing import Any, Unpack

from reward_client.adapters.options import ClientOptions, ScoreOptions
from reward_client.checks import check_weights
from reward_client.options import TemplateChoice, Truncation
from reward_client.requests import Completion, Prompt, Weights
from reward_client.synchronous import RewardClient


class RewardFunction:
    """Called with prompts and completions, returns one reward per completion.

    Process pools pickle a function with every call: all its copies in a process are one object with one client.

    Args:
        url: the root URL of the service.
        truncation: what happens to an item that is too long; None: the service's setting.
        weights: of the outputs of a model with several; None: the service's own.
        template: how a plain-text prompt is rendered; None: the service's setting.
        options: those of ``RewardClient``.

    Raises:
        InvalidArgument: see ``RewardClient``.
    """

    def __init__(
        self,
        url: str,
        *,
        truncation: Truncation | None = None,
        weights: Weights | None = None,
        template: TemplateChoice | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        self.client = RewardClient(url, **options)
        self.score_options = ScoreOptions(truncation=truncation, template=template, weights=check_weights(weights))

    def __call__(self, prompts: Iterable[Prompt], completions: Iterable[Completion], *_: Any, **__: Any) -> list[float]:
        """Return the raw reward of each completion, in order; further arguments are ignored.

        Raises:
            ClientError: see ``AsyncRewardClient.score``.
        """
        return self.client.score(prompts, completions, **self.score_options)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), pickle.dumps(self.__dict__))


class ItemRewardFunction(RewardFunction):
    """Called with one prompt and one completion, returns one reward: AReaL's ``reward_fn``.

    AReaL turns a call that takes more than 15 s into the reward 0, so ``deadline_s`` must be below that. Its prompts
    are decoded token ids, in the actor's template already: ``template="concat"``.
    """

    # The second name is AReaL's, which passes one completion.
    def __call__(self, prompt: Prompt, completions: Completion, *_: Any, **__: Any) -> float:  # type: ignore[override]
        """Return the raw reward of the completion; further arguments (token ids, columns) are ignored.

        Raises:
            ClientError: see ``AsyncRewardClient.score``.
        """
        [reward] = super().__call__([prompt], [completions])
        return reward


@functools.lru_cache(maxsize=32)
def _restored(kind: type[RewardFunction], state: bytes) -> RewardFunction:
    function = kind.__new__(kind)
    function.__dict__.update(pickle.loads(state))  # noqa: S301 - the bytes of __reduce__
    return function
