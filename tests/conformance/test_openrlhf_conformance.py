"""OpenRLHF 0.11 and 0.9, over HTTP and with the reward-function file, end with the rewards of ``/v1/score``."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import framework_code
import pytest
import requests
import torch
from reward_client import RewardClient
from reward_client.adapters import openrlhf, query_rewards
from serving import RunningServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUESTION = "How do I boil an egg?"
COMPLETIONS = ["Put it into boiling water.", "No.", "Seven minutes, then cool it."]
STUBS: dict[str, dict[str, Any]] = {"openrlhf.utils.logging_utils": {"init_logger": logging.getLogger}}


@pytest.fixture(scope="module")
def executor_class() -> Any:
    """The single-turn agent of version 0.11."""
    wheel = framework_code.wheel("openrlhf==0.11.2")
    return framework_code.module(wheel, "utils/agent.py", STUBS).SingleTurnAgentExecutor


@pytest.fixture
def prompt(tokenizer: Any) -> str:
    """The prompt as OpenRLHF passes it: in the actor's template, which begins with BOS."""
    messages = [{"role": "user", "content": QUESTION}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    assert text.startswith(tokenizer.bos_token)
    return text


@pytest.fixture
def queries(prompt: str) -> list[str]:
    """Whole texts, as the actor ends its turn."""
    return [f"{prompt}{completion}<|im_end|>\n" for completion in COMPLETIONS]


@pytest.fixture
def expected(client: RewardClient) -> list[float]:
    """The rewards of the exchanges, rendered by the service; the texts are the same."""
    return client.score([QUESTION] * len(COMPLETIONS), COMPLETIONS)


def test_the_agents_requests(
    executor_class: Any, server: RunningServer, prompt: str, queries: list[str], expected: list[float], same: Any
) -> None:
    """Version 0.11: rewards and scores are raw, and every extra log becomes a tensor."""
    executor = executor_class([f"{server.url}/get_reward"])

    [answer] = asyncio.run(executor._fetch_rewards_via_http(queries, [prompt] * len(queries), [None] * len(queries)))

    assert answer["rewards"] == same(expected)
    assert answer["scores"] == answer["rewards"]
    assert answer["extra_logs"]
    assert all(torch.tensor([value]).isfinite().all() for value in answer["extra_logs"].values())


def test_the_agent_from_tokens_to_reward(
    executor_class: Any, server: RunningServer, prompt: str, expected: list[float], tokenizer: Any, same: Any
) -> None:
    """Version 0.11, whole path: the agent decodes the rollout itself, special tokens included, and adds no BOS."""
    outputs = [_execute(executor_class, f"{server.url}/get_reward", prompt, text, tokenizer) for text in COMPLETIONS]

    assert [output["reward"][0] for output in outputs] == same(expected)
    assert [output["scores"] for output in outputs] == [output["reward"] for output in outputs]
    assert len({tuple(sorted(output["extra_logs"])) for output in outputs}) == 1


def test_many_connections_of_one_item_each(
    executor_class: Any, server: RunningServer, prompt: str, client: RewardClient, same: Any
) -> None:
    """64 rollouts at once, each on a connection of its own: every one gets its own reward."""
    executor = executor_class(f"{server.url}/get_reward")
    completions = [f"Answer {number}: " + "egg " * (number % 7) for number in range(64)]

    async def rewards() -> list[float]:
        calls = [
            executor._fetch_rewards_via_http([f"{prompt}{completion}<|im_end|>\n"], [prompt], [None])
            for completion in completions
        ]
        return [answer["rewards"][0] for [answer] in await asyncio.gather(*calls)]

    assert asyncio.run(rewards()) == same(client.score([QUESTION] * 64, completions))


def test_a_query_over_the_limit_is_no_reward(executor_class: Any, server: RunningServer, prompt: str) -> None:
    """Version 0.11 tries five times and raises; there is no answer from which it would read a reward of None."""
    executor = executor_class([f"{server.url}/get_reward"])

    with pytest.raises(RuntimeError, match="5 times"):
        asyncio.run(executor._fetch_rewards_via_http([prompt + "egg " * 12_000], [prompt], [None]))


def test_the_wrapper_of_older_versions(
    server: RunningServer, prompt: str, queries: list[str], expected: list[float], same: Any
) -> None:
    """Version 0.9 posts whole micro-batches with ``requests``."""
    wheel = framework_code.wheel("openrlhf==0.9.0")
    namespace = {"requests": requests, "logger": logging.getLogger("openrlhf"), "time": SimpleNamespace(sleep=print)}
    definitions = framework_code.definitions(wheel, "utils/remote_rm_utils.py", {"request_api_wrapper"}, namespace)

    data = {"query": queries, "prompts": [prompt] * len(queries), "labels": [None] * len(queries)}
    answer = definitions["request_api_wrapper"](f"{server.url}/get_reward", data)

    assert torch.as_tensor(answer["rewards"]).tolist() == same(expected)


def test_the_reward_function_file(
    executor_class: Any,
    server: RunningServer,
    prompt: str,
    expected: list[float],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    same: Any,
) -> None:
    """The agent loads the file by its path; the result is that of the route."""
    monkeypatch.setenv("REMOTE_REWARD_URL", server.url)
    query_rewards._client.cache_clear()
    try:
        outputs = [_execute(executor_class, openrlhf.__file__, prompt, text, tokenizer) for text in COMPLETIONS]
    finally:
        query_rewards._client()[0].close()
        query_rewards._client.cache_clear()

    assert [output["reward"][0] for output in outputs] == same(expected)
    assert all(torch.tensor([value]).isfinite().all() for value in outputs[0]["extra_logs"].values())


def _execute(executor_class: Any, endpoint: str, prompt: str, completion: str, tokenizer: Any) -> dict[str, Any]:
    """One rollout whose engine generates the completion and the end of its turn."""
    ids = tokenizer(f"{completion}<|im_end|>\n", add_special_tokens=False)["input_ids"]
    generated = SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, finish_reason="stop", logprobs=None)])

    class Engine:
        async def generate(self, *_: Any, **__: Any) -> Any:
            return generated

    parameters = SimpleNamespace(max_tokens=64, logprobs=None)
    output: dict[str, Any] = asyncio.run(
        executor_class([endpoint]).execute(prompt, None, parameters, 512, tokenizer, Engine())
    )
    assert output["reward"] is not None
    return output
