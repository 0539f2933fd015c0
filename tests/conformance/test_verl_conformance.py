"""The reward loop of verl: its requests to a reward model, and its calls of the adapters, end with ``/v1/score``'s."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import framework_code
import pytest
import torch
from reward_client import AsyncRewardClient, RewardClient
from reward_client.adapters.verl import RemoteRewardManager
from serving import RunningServer, serving
from tiny_models import write_tiny_checkpoint
from transformers import AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REQUIREMENT = "verl==0.9.1"
PROMPT = [{"role": "user", "content": "How do I boil an egg?"}]
COMPLETIONS = ["Put it into boiling water.", "No.", "Seven minutes, then cool it."]
ENGINES = ["vllm", "sglang"]
QUEUE_TOKENS = 1024


@pytest.fixture(scope="module")
def wheel() -> Any:
    return framework_code.wheel(REQUIREMENT)


def verls_worker(wheel: Any, speed: float, http: Any = aiohttp) -> Any:
    """The class that sends the requests.

    Args:
        wheel: of verl.
        speed: by how much its delays are divided.
        http: what it uses as aiohttp.
    """

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / speed)

    namespace = {
        "asyncio": SimpleNamespace(sleep=sleep, TimeoutError=asyncio.TimeoutError),
        "aiohttp": http,
        "logger": logging.getLogger("verl"),
    }
    return framework_code.definitions(wheel, "reward_loop/reward_loop.py", {"RewardLoopWorker"}, namespace)[
        "RewardLoopWorker"
    ]


@pytest.fixture(scope="module")
def worker_class(wheel: Any) -> Any:
    """The class that sends the requests, with delays that are a hundred times shorter."""
    return verls_worker(wheel, 100)


def sample(tokenizer: Any, completion: str) -> Any:
    """One sample of verl: its conversation, and the ids of its response up to EOS, padded."""
    ids = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    padding = [tokenizer.pad_token_id] * 3
    return SimpleNamespace(
        batch={
            "responses": torch.tensor(ids + padding),
            "attention_mask": torch.tensor([1, 1] + [1] * len(ids) + [0] * len(padding)),
        },
        non_tensor_batch={
            "raw_prompt": PROMPT,
            "data_source": "s",
            "reward_model": {"ground_truth": "g"},
            "extra_info": {"prompt": PROMPT},
        },
    )


def worker(worker_class: Any, address: str, engine: str, tokenizer: Any) -> Any:
    created = worker_class.__new__(worker_class)
    created.reward_router_address = address
    rollout = SimpleNamespace(name=engine)
    created.config = SimpleNamespace(
        reward=SimpleNamespace(reward_model=SimpleNamespace(rollout=rollout, model_path="/models/reward"))
    )
    created.input_tokenizer = created.reward_model_tokenizer = tokenizer
    return created


@pytest.mark.parametrize("engine", ENGINES)
def test_requests_to_a_reward_model_return_its_rewards(
    engine: str, worker_class: Any, server: RunningServer, client: RewardClient, tokenizer: Any, same: Any
) -> None:
    """The template that verl applies, its stripped BOS and its field names end with the reward of the exchange."""
    asking = worker(worker_class, urlsplit(server.url).netloc, engine, tokenizer)

    async def scores() -> list[float]:
        calls = [asking.compute_score_disrm([sample(tokenizer, completion)]) for completion in COMPLETIONS]
        return [answer["reward_score"] for answer in await asyncio.gather(*calls)]

    assert asyncio.run(scores()) == same(client.score([PROMPT] * len(COMPLETIONS), COMPLETIONS))


@pytest.mark.parametrize("engine", ENGINES)
def test_many_connections_of_one_item_each(
    engine: str, worker_class: Any, server: RunningServer, client: RewardClient, tokenizer: Any, same: Any
) -> None:
    """64 samples at once, each on a connection of its own: every one gets its own reward."""
    asking = worker(worker_class, urlsplit(server.url).netloc, engine, tokenizer)
    completions = [f"Answer {number}: " + "egg " * (number % 7) for number in range(64)]

    async def scores() -> list[float]:
        calls = [asking.compute_score_disrm([sample(tokenizer, completion)]) for completion in completions]
        return [answer["reward_score"] for answer in await asyncio.gather(*calls)]

    assert asyncio.run(scores()) == same(client.score([PROMPT] * 64, completions))


@dataclass
class Answers:
    """aiohttp, with a record of the status and the Retry-After of every answer."""

    seen: list[tuple[int, str | None]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(aiohttp, name)

    def ClientSession(self, **options: Any) -> aiohttp.ClientSession:  # noqa: N802 - the name of aiohttp's class
        async def on_end(_session: Any, _context: Any, end: aiohttp.TraceRequestEndParams) -> None:
            self.seen.append((end.response.status, end.response.headers.get("Retry-After")))

        trace = aiohttp.TraceConfig()
        trace.on_request_end.append(on_end)
        return aiohttp.ClientSession(**options, trace_configs=[trace])


@pytest.mark.parametrize("runtime", ["ray", "local"])
def test_overload_is_survived(runtime: str, wheel: Any, tmp_path: Path) -> None:
    """64 samples at once for a queue that holds a few: some get 503 with Retry-After, and all end with their reward."""
    # Large enough that the pass of one sample takes longer than the arrival of the next on any CPU.
    checkpoint = write_tiny_checkpoint(
        tmp_path / "tiny", "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=12
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    completions = [f"Answer {number}: " + "egg " * 80 for number in range(64)]
    answers = Answers()
    limits = ("--limits.max_queue_tokens", str(QUEUE_TOKENS))
    with serving(tmp_path, "--model", str(checkpoint), "--dtype", "float32", *limits, runtime=runtime) as server:
        asking = worker(verls_worker(wheel, 10, answers), urlsplit(server.url).netloc, "vllm", tokenizer)

        async def scores() -> list[float]:
            calls = [asking.compute_score_disrm([sample(tokenizer, completion)]) for completion in completions]
            return [answer["reward_score"] for answer in await asyncio.gather(*calls)]

        rewards = asyncio.run(scores())
        with RewardClient(server.url, deadline_s=120) as client:
            expected = client.score([PROMPT] * len(completions), completions)

    assert rewards == pytest.approx(expected, abs=1e-5)
    refusals = [retry_after for status, retry_after in answers.seen if status == 503]
    assert {status for status, _ in answers.seen} == {200, 503}
    assert all(retry_after is not None and int(retry_after) >= 1 for retry_after in refusals)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sequence_over_the_limit_ends_the_job(
    engine: str, worker_class: Any, server: RunningServer, tokenizer: Any
) -> None:
    """What can never be scored is a 4xx, which verl raises at once, and never a number."""
    asking = worker(worker_class, urlsplit(server.url).netloc, engine, tokenizer)

    with pytest.raises(aiohttp.ClientResponseError) as raised:
        asyncio.run(asking.compute_score_disrm([sample(tokenizer, "egg " * 12_000)]))
    assert raised.value.status == 422


# The adapters


@pytest.fixture(scope="module")
def managers(wheel: Any) -> dict[str, Any]:
    """The base class and naive manager of verl, and its loader of custom functions."""
    namespace: dict[str, Any] = {
        "ABC": object,
        "abstractmethod": lambda function: function,
        "inspect": inspect,
        "torch": torch,
        "partial": partial,
        "register": lambda _: lambda kind: kind,
        "default_compute_score": None,
        "get_event_loop": asyncio.get_event_loop,
    }
    folder = "experimental/reward_loop/reward_manager/"
    framework_code.definitions(wheel, folder + "base.py", {"RewardManagerBase"}, namespace)
    framework_code.definitions(wheel, folder + "naive.py", {"NaiveRewardManager"}, namespace)
    loader = {"get_custom_reward_fn", "_call_with_kwargs", "_call_with_kwargs_async"}
    framework_code.definitions(wheel, "trainer/ppo/reward.py", loader, namespace)
    imports = framework_code.module(wheel, "verl/utils/import_utils.py", {})
    namespace["load_extern_object"] = imports.load_extern_object
    return namespace


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """Runs a coroutine and closes the connections that the adapters opened on its loop."""
    used: list[AsyncRewardClient] = []
    pool = AsyncRewardClient._pool

    def recorded_pool(self: AsyncRewardClient) -> Any:
        used.append(self)
        return pool(self)

    monkeypatch.setattr(AsyncRewardClient, "_pool", recorded_pool)

    async def run_and_close(coroutine: Any) -> Any:
        try:
            return await coroutine
        finally:
            for client in used:
                await client.aclose()

    return lambda coroutine: asyncio.run(run_and_close(coroutine))


def test_the_naive_manager_calls_the_function(
    managers: dict[str, Any],
    server: RunningServer,
    client: RewardClient,
    tokenizer: Any,
    run: Callable[[Any], Any],
    same: Any,
) -> None:
    """Loaded by verl's own loader with the documented lines, it is awaited and its numbers are kept."""
    lines = {
        "path": "pkg://reward_client.adapters.verl",
        "name": "compute_score",
        "reward_kwargs": {"url": server.url, "deadline_s": 60},
    }
    config = SimpleNamespace(reward={"custom_reward_function": lines})

    async def scored() -> list[Any]:
        with framework_code.stubbed(
            {"verl.utils.import_utils": {"load_extern_object": managers["load_extern_object"]}}
        ):
            function = managers["get_custom_reward_fn"](config)
        manager = managers["NaiveRewardManager"](config, tokenizer, function)
        return list(
            await asyncio.gather(*(manager.run_single([sample(tokenizer, completion)]) for completion in COMPLETIONS))
        )

    answers = run(scored())

    expected = client.score([PROMPT] * len(COMPLETIONS), COMPLETIONS)
    assert [answer["reward_score"] for answer in answers] == same(expected)
    assert all(answer["reward_extra_info"]["rm_scored_tokens"] > 0 for answer in answers)
    assert len({tuple(answer["reward_extra_info"]) for answer in answers}) == 1


def test_the_manager_of_ours_does_what_verls_does(
    managers: dict[str, Any],
    server: RunningServer,
    client: RewardClient,
    tokenizer: Any,
    run: Callable[[Any], Any],
    same: Any,
) -> None:
    """It is loaded by verl's loader, scores the raw prompt, and places rewards where verl's base class does."""
    kind = managers["load_extern_object"](
        module_path="pkg://reward_client.adapters.verl", object_name="RemoteRewardManager"
    )
    assert kind is RemoteRewardManager
    config = SimpleNamespace(reward={"reward_kwargs": {"url": server.url}})
    # As verl's load_reward_manager creates it.
    manager = kind(
        config=config, tokenizer=tokenizer, compute_score=None, reward_router_address=None, reward_model_tokenizer=None
    )

    answer = run(manager.run_single([sample(tokenizer, COMPLETIONS[0])]))

    assert [answer["reward_score"]] == same(client.score([PROMPT], COMPLETIONS[:1]))
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]])
    batch = {"prompts": torch.zeros(2, 2), "responses": torch.full((2, 4), 7), "attention_mask": mask}
    data, scores = SimpleNamespace(batch=batch), [1.5, -0.25]
    placed = kind.assemble_rm_scores(data, scores)
    theirs = managers["RewardManagerBase"].assemble_rm_scores(data, scores)
    assert torch.equal(placed, theirs)
    assert placed.dtype == theirs.dtype
