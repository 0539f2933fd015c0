"""A reward function over message logs, from which an environment of NeMo-RL is made.

NeMo-RL's environments are Ray actors that return tensors. This module imports neither, so the environment around it is
written in the trainer's own code:

    @ray.remote
    class RemoteRewardEnvironment(EnvironmentInterface):
        def __init__(self, config):
            self.score = MessageLogReward(config["url"], content="templated")

        def step(self, message_log_batch, metadata):
            step = self.score(message_log_batch, metadata)
            return EnvironmentReturn(
                observations=step.observations, metadata=step.metadata, next_stop_strings=step.next_stop_strings,
                rewards=torch.tensor(step.rewards), terminateds=torch.tensor(step.terminateds), answers=step.answers,
            )

        def global_post_process_and_metrics(self, batch):
            return batch, {}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Unpack

from reward_client.adapters.columns import named_reward
from reward_client.adapters.options import ClientOptions
from reward_client.checks import check_weights, elements, one_of
from reward_client.errors import InvalidArgument
from reward_client.options import TemplateChoice, Truncation
from reward_client.requests import Weights
from reward_client.synchronous import RewardClient

MessageLog = Sequence[Mapping[str, Any]]

MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Fields of a message that are sent; the others (token ids, log probabilities) are tensors of the trainer."""


@dataclass(frozen=True, slots=True)
class EnvironmentStep:
    """What an environment returns for a batch, with lists instead of tensors."""

    observations: list[dict[str, str]]
    """An empty message of the environment for each log: a reward model says nothing."""
    metadata: list[Any]
    """As given."""
    next_stop_strings: list[None]
    rewards: list[float] | list[list[float]]
    """The raw reward of each log; with ``outputs`` [log][output], which NeMo-RL sums for a log's total reward and
    normalises one by one for GDPO."""
    terminateds: list[bool]
    """True: a rewarded conversation has ended."""
    answers: list[str]
    """The completion of each log."""


class MessageLogReward:
    """Scores the last message of each log, given those before it.

    Args:
        url: the root URL of the service.
        content: ``messages``: the contents are plain texts and the service renders its template over them.
            ``templated``: they are already in the actor's template, as the data processors of NeMo-RL that apply a chat
            template leave them; they are joined and scored as they are.
        outputs: of a model with several outputs, the names of those that are returned for each log, or their weights
            by name, by which each is multiplied. None: the reward alone.
        truncation: what happens to an item that is too long; None: the service's setting.
        options: those of ``RewardClient``.

    Raises:
        InvalidArgument: see ``RewardClient``.
    """

    def __init__(
        self,
        url: str,
        *,
        content: Literal["messages", "templated"] = "messages",
        outputs: Sequence[str] | Weights | None = None,
        truncation: Truncation | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        one_of(content, "content", ("messages", "templated"))
        self.client = RewardClient(url, **options)
        self.content = content
        self.weights = _weights_of(outputs)
        self.truncation: Truncation | None = truncation

    def __call__(
        self, message_log_batch: Sequence[MessageLog], metadata: Sequence[Any] | None = None
    ) -> EnvironmentStep:
        """Return the rewards of a batch of logs and everything else that an environment returns.

        Raises:
            InvalidArgument: a log does not end with a message of the assistant, or has none before it; or the model
                has no output of a name that was given.
            ClientError: see ``AsyncRewardClient.score``.
        """
        exchanges = [_exchange(log, index) for index, log in enumerate(message_log_batch)]
        answers = [completion for _, completion in exchanges]
        template: TemplateChoice | None = None
        prompts: list[Any] = [prompt for prompt, _ in exchanges]
        if self.content == "templated":
            template = "concat"
            prompts = ["".join(message["content"] for message in prompt) for prompt in prompts]
        rewards = self._score(prompts, answers, template)
        number = len(rewards)
        return EnvironmentStep(
            observations=[{"role": "environment", "content": ""} for _ in rewards],
            metadata=[None] * number if metadata is None else list(metadata),
            next_stop_strings=[None] * number,
            rewards=rewards,
            terminateds=[True] * number,
            answers=answers,
        )

    def _score(
        self, prompts: Sequence[Any], answers: Sequence[str], template: TemplateChoice | None
    ) -> list[float] | list[list[float]]:
        if self.weights is None:
            return self.client.score(prompts, answers, truncation=self.truncation, template=template)
        items = self.client.score(prompts, answers, diagnostics="none", truncation=self.truncation, template=template)
        return [[weight * named_reward(item, name) for name, weight in self.weights.items()] for item in items]


def _weights_of(outputs: Sequence[str] | Weights | None) -> dict[str, float] | None:
    if outputs is None or isinstance(outputs, Mapping):
        return check_weights(outputs)
    return check_weights(dict.fromkeys(elements(outputs, "outputs", "names of outputs"), 1.0))


def _exchange(log: MessageLog, index: int) -> tuple[list[dict[str, Any]], str]:
    messages = [{name: message[name] for name in MESSAGE_FIELDS if name in message} for message in log]
    match messages:
        case [*prompt, {"role": "assistant", "content": str(completion)}] if prompt:
            return prompt, completion
    raise InvalidArgument(
        f"message_log_batch[{index}] must end with a message of the assistant whose content is a text, after at least "
        f"one other message; it has {len(messages)} messages"
    )
