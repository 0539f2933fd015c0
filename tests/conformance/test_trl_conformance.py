"""TRL's own trainers with the adapters: the rewards that they train with are those of ``/v1/score``."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from datasets import Dataset
from reward_client import RewardClient
from reward_client.adapters.trl import AsyncRemoteReward, RemoteReward
from reward_client.errors import ServiceUnavailable
from serving import RunningServer, serving
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # Of libraries that the trainer uses, not of ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

QUESTIONS = ["How do I boil an egg?", "Write a short poem about the sea.", "What is a reward model?"]
CONVERSATIONS: list[Any] = [[{"role": "user", "content": question}] for question in QUESTIONS]

TEMPLATE_WITH_TOOL_CALLS = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _rollout(factor: int, product: str) -> list[dict[str, Any]]:
    """A call of a tool, its result and the answer, in the form in which TRL's tool loop leaves them."""
    function = {"name": "multiply", "arguments": {"a": 3, "b": factor}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "multiply", "content": product},
        {"role": "assistant", "content": f"It is {product}."},
    ]


ROLLOUTS = [_rollout(4, "12"), _rollout(5, "15"), [{"role": "assistant", "content": "It is 12."}]]


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random causal language model."""
    return write_tiny_causal_lm(tmp_path_factory.mktemp("policy") / "tiny", "llama", seed=3)


@pytest.mark.parametrize("reward", [RemoteReward, AsyncRemoteReward], ids=["sync", "async"])
@pytest.mark.parametrize("prompts", [QUESTIONS, CONVERSATIONS], ids=["texts", "conversations"])
@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_trainer_learns_from_the_rewards_of_the_service(
    method: str,
    prompts: list[Any],
    reward: Any,
    server: RunningServer,
    client: RewardClient,
    policy: Path,
    tmp_path: Path,
    same: Any,
) -> None:
    """Two steps: every logged reward equals ``/v1/score`` for the logged texts, and the diagnostics are logged."""
    function = reward(server.url)
    trainer = _trainer(method, function, prompts, policy, tmp_path)

    trainer.train()
    _close(function, trainer)

    logs = trainer._logs
    rewards = list(logs["rewards"][reward.__name__])
    assert len(rewards) == 4  # those of the last step
    assert rewards == same(client.score(list(logs["prompt"]), list(logs["completion"])))
    assert all(length > 0 for length in logs["extra"]["rm_scored_tokens"])
    logged = [entry for entry in trainer.state.log_history if "reward_model/scored_tokens" in entry]
    assert len(logged) == 2
    assert all(entry[f"rewards/{reward.__name__}/mean"] != 0.0 for entry in logged)


@pytest.mark.parametrize("reward", [RemoteReward, AsyncRemoteReward], ids=["sync", "async"])
def test_a_trainer_ends_with_the_clients_exception(reward: Any, policy: Path, tmp_path: Path) -> None:
    """Without a service the training ends with a typed error instead of a reward."""
    function = reward("http://127.0.0.1:9", wait_for_start_s=0)

    trainer = _trainer("grpo", function, QUESTIONS, policy, tmp_path)

    with pytest.raises(ServiceUnavailable):
        trainer.train()
    _close(function, trainer)


def test_a_rollout_with_tools_is_one_completion(policy: Path, tmp_path: Path) -> None:
    """The messages of a tool-calling rollout reach the service as they are, by TRL's own call of the function."""
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny", "llama")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template = TEMPLATE_WITH_TOOL_CALLS
    tokenizer.save_pretrained(checkpoint)
    with serving(tmp_path, "--model", str(checkpoint), "--dtype", "float32", runtime="local") as server:
        function = RemoteReward(server.url)
        trainer = _trainer("grpo", function, CONVERSATIONS, policy, tmp_path)

        rows = [{"prompt": CONVERSATIONS[0]}] * len(ROLLOUTS)
        prompts = [CONVERSATIONS[0]] * len(ROLLOUTS)
        rewards = trainer._calculate_rewards(rows, prompts, ROLLOUTS, [[1]] * len(ROLLOUTS))[:, 0].tolist()
        _close(function, trainer)
        items = [{"prompt": CONVERSATIONS[0], "completion": rollout} for rollout in ROLLOUTS]
        answer = httpx2.post(f"{server.url}/v1/score", json={"items": items}, timeout=60).json()

    assert rewards == pytest.approx([result["reward"] for result in answer["results"]], abs=1e-5)
    assert len({round(reward, 5) for reward in rewards}) == len(ROLLOUTS)


# TRL stops the event loop of a trainer at the exit of the process, so trainers live until then.
TRAINERS: list[Any] = []


def _close(function: Any, trainer: Any) -> None:
    """Close the connections of a reward function in the loop that opened them."""
    TRAINERS.append(trainer)
    if isinstance(function, RemoteReward):
        function.client.close()
    else:
        asyncio.run_coroutine_threadsafe(function.client.aclose(), trainer.async_loop).result()


def _trainer(method: str, reward: Any, prompts: list[Any], policy: Path, folder: Path) -> Any:
    config_class, trainer_class = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}[method]
    config = config_class(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"prompt": prompts})
    return trainer_class(model=str(policy), reward_funcs=reward, args=config, train_dataset=data)
