"""A reward function and a reward manager for verl's reward loop, which score with a service outside of the trainer.

Each sample is a call of its own and all samples of a batch are in flight at once; the service batches them. An
exception ends the job, so nothing is retried outside of the client.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from reward_client.adapters.columns import level_of, numbers
from reward_client.adapters.options import AdapterOptions, read_options
from reward_client.asynchronous import AsyncRewardClient
from reward_client.errors import InvalidArgument
from reward_client.requests import Completion, Prompt

DEFAULT_MAX_CONNECTIONS = 64
"""Concurrent requests of one worker; verl has eight workers."""

FUNCTION_WHERE = "reward.custom_reward_function.reward_kwargs.url, or REMOTE_REWARD_URL in the environment"
MANAGER_WHERE = "reward.reward_kwargs.url, or REMOTE_REWARD_URL in the environment"


async def compute_score(
    data_source: object = None,
    solution_str: str | None = None,
    ground_truth: object = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    prompt_key: str = "prompt",
    reward_router_address: str | None = None,
    reward_model_tokenizer: object = None,
    **options: Any,
) -> dict[str, float]:
    """Return the score of one completion: verl's ``reward.custom_reward_function``.

    verl does not pass the prompt, so the data set must have it in ``extra_info``. This is a plain coroutine function
    because verl takes any other callable for a synchronous one.

    Args:
        data_source: ignored.
        solution_str: the completion, decoded without special tokens.
        ground_truth: ignored.
        extra_info: the column of the data set; holds the prompt, a text or a conversation.
        prompt_key: the name of the prompt in ``extra_info``.
        reward_router_address: the address of a reward model that verl runs; there must be none.
        reward_model_tokenizer: as above.
        options: ``reward_kwargs``: ``url``, ``truncation``, ``template``, ``extras`` and the options of the client.

    Returns:
        ``score``, the raw reward, and the diagnostics of ``extras`` (``rm_scored_tokens``), the same keys each time;
        NaN where a value is unknown.

    Raises:
        InvalidArgument: no URL, no prompt in ``extra_info``, an option is wrong, or verl runs a reward model itself.
        ClientError: see ``AsyncRewardClient.score``.
    """
    del data_source, ground_truth, reward_model_tokenizer
    if reward_router_address is not None:
        raise InvalidArgument("verl runs a reward model of its own: set reward.reward_model.enable=False")
    if solution_str is None:
        raise InvalidArgument("verl passed no solution_str")
    prompt = (extra_info or {}).get(prompt_key)
    if prompt is None:
        raise InvalidArgument(
            f"extra_info has no {prompt_key!r}: verl does not pass the prompt to a reward function, so the data set "
            "must have it there; or use RemoteRewardManager, which sees the prompt"
        )
    client, read = _client(_hashable(options), FUNCTION_WHERE)
    return await _score(client, read, prompt, solution_str)


class RemoteRewardManager:
    """Scores each sample by its raw prompt: verl's ``reward.reward_manager`` with ``source=importlib``.

    Args:
        config: verl's configuration; ``reward.reward_kwargs`` has ``url`` and the other options.
        tokenizer: the actor's, which decodes the completions.
        compute_score: verl's reward function, which is not called.
        reward_router_address: the address of a reward model that verl runs; there must be none.
        reward_model_tokenizer: as above.

    Raises:
        InvalidArgument: no URL, an option is wrong, or verl runs a reward model itself.
    """

    def __init__(
        self,
        config: Any,
        tokenizer: Any,
        compute_score: Any = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        del compute_score, reward_model_tokenizer
        if reward_router_address is not None:
            raise InvalidArgument("verl runs a reward model of its own: set reward.reward_model.enable=False")
        self._tokenizer = tokenizer
        self._client, self._options = _client(_hashable(config.reward.get("reward_kwargs") or {}), MANAGER_WHERE)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """Return the reward of one sample.

        Args:
            data: verl's ``DataProto`` with one sample, or with the sequences of one sample, of which the last counts.
                ``raw_prompt`` is its conversation; the completion is decoded without special tokens.

        Returns:
            ``reward_score``, the raw reward, and ``reward_extra_info``, the diagnostics of ``extras``, the same keys
            each time; NaN where a value is unknown.

        Raises:
            InvalidArgument: the sample has no ``raw_prompt``.
            ClientError: see ``AsyncRewardClient.score``.
        """
        sample = data[-1:][0]
        prompt = sample.non_tensor_batch.get("raw_prompt")
        if prompt is None:
            raise InvalidArgument("The sample has no raw_prompt: set data.return_raw_chat=True")
        response_ids = sample.batch["responses"]
        num_ids = int(sample.batch["attention_mask"][-len(response_ids) :].sum())
        decode = functools.partial(self._tokenizer.decode, response_ids[:num_ids], skip_special_tokens=True)
        completion = await asyncio.get_running_loop().run_in_executor(None, decode)
        scored = await _score(self._client, self._options, list(prompt), completion)
        return {"reward_score": scored.pop("score"), "reward_extra_info": scored}

    @classmethod
    def assemble_rm_scores(cls, data: Any, scores: Sequence[float]) -> Any:
        """Return the tensor of rewards, float32 [samples, response tokens], each at the last token of its response.

        Args:
            data: verl's batch with ``prompts``, ``responses`` and ``attention_mask``.
            scores: one reward per sample.
        """
        responses = data.batch["responses"]
        num_prompt_ids = data.batch["prompts"].shape[1]
        last = data.batch["attention_mask"][:, num_prompt_ids:].sum(dim=1) - 1
        rewards = responses.float() * 0
        rewards[list(range(len(scores))), last] = rewards.new_tensor(list(scores))
        return rewards


async def _score(
    client: AsyncRewardClient, options: AdapterOptions, prompt: Prompt, completion: Completion
) -> dict[str, float]:
    level = level_of(options.extras)
    [item] = await client.score([prompt], [completion], diagnostics=level, **options.score)
    return {"score": item.known_reward, **numbers(item, options.extras)}


def _hashable(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Return the values of a configuration as a key: lists as tuples, mappings as tuples of pairs."""
    return tuple(sorted((name, _frozen(value)) for name, value in options.items()))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _Pairs(sorted((name, _frozen(entry)) for name, entry in value.items()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_frozen(entry) for entry in value)
    return value


class _Pairs(tuple[tuple[str, Any], ...]):
    """A mapping as pairs, told apart from a list."""

    __slots__ = ()


@functools.lru_cache(maxsize=32)
def _client(options: tuple[tuple[str, Any], ...], where: str) -> tuple[AsyncRewardClient, AdapterOptions]:
    """Return the client for the options; each process has one, with connections for each event loop."""
    given = {name: dict(value) if isinstance(value, _Pairs) else value for name, value in options}
    read = read_options(given, where)
    client_options = read.client
    client_options.setdefault("max_connections", DEFAULT_MAX_CONNECTIONS)
    return AsyncRewardClient(read.url, **client_options), read
