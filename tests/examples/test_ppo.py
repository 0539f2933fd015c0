"""The PPO example: its arithmetic, and the loop against real servers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_client import RewardClient
from reward_client.errors import NoAnswer
from serving import serving
from tiny_calibration import write_calibrated_checkpoint
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.ppo.ppo import (
    Critic,
    Policy,
    Trainer,
    advantages_of,
    main,
    parser,
    ppo_loss,
    read_prompts,
    shuffled_forever,
    token_rewards,
    whitened,
)

PROMPTS = ["How do I boil an egg?", "Please write a short poem about the sea, the wind and an old ship."]
MASK = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])


def conversations(prompts: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": prompt}] for prompt in prompts]


def tiny_policy(folder: Path, trained_layers: int | None = None) -> Policy:
    write_tiny_causal_lm(folder, "llama", seed=3)
    return Policy(str(folder), torch.float32, trained_layers, 1.0)


def test_the_score_is_the_reward_of_the_last_token_and_the_penalty_is_that_of_every_token() -> None:
    """Scores come after the last token of each completion; padding gets nothing."""
    log_ratio = torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 9.0]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), log_ratio, MASK, kl_weight=0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 8.5], [-0.5, 21.0, 0.0]]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_advantages_are_the_sums_of_the_definition(gae_lambda: float) -> None:
    """The recursion equals the sum of lambda^k d_(i+k) (Schulman et al. 2016, eq. 16)."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3) * MASK, torch.randn(2, 3)
    found = advantages_of(rewards, values, MASK, gae_lambda)
    for row, length in enumerate((3, 2)):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, i].item() + v[i + 1] - v[i] for i in range(length)]
        for i in range(length):
            expected = sum(gae_lambda ** (k - i) * deltas[k] for k in range(i, length))
            assert found[row, i].item() == pytest.approx(expected, abs=1e-5)
    assert found[1, 2] == 0.0


def test_the_loss_has_no_gradient_beyond_the_clipped_ratio() -> None:
    """A token that is already more likely by more than the limit is not pushed further; the other one is."""
    logprobs = torch.log(torch.tensor([[1.5, 1.1]])).requires_grad_()
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    ppo_loss(logprobs, zeros, zeros, ones, zeros, ones, clip=0.2).backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0, 0] == 0.0
    assert logprobs.grad[0, 1] == pytest.approx(-1.1 / 2)


def test_whitened_values_ignore_padding() -> None:
    """Mean 0 and variance 1 over the tokens of the completions, whatever the padding holds."""
    values = whitened(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 1e6]]), MASK)[MASK.bool()]
    assert values.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert values.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)


def test_log_probabilities_are_those_of_plain_transformers_on_each_conversation_alone(tmp_path: Path) -> None:
    """Padding, and the other completions of the batch, change nothing."""
    policy = tiny_policy(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    torch.manual_seed(1)
    rollout = policy.sample(tokenizer, conversations(PROMPTS), max_tokens=6)
    found, values, states = policy(rollout)
    assert states is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    for row in range(2):
        tokens = rollout.tokens[row][rollout.attention_mask[row].bool()]
        count = int(rollout.mask[row].sum())
        logprobs = plain(tokens[None]).logits[0, -count - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(-1, tokens[-count:, None]).squeeze(-1)
        torch.testing.assert_close(found[row, :count], expected, atol=1e-4, rtol=1e-4)
    assert values.shape == rollout.mask.shape


def test_a_completion_ends_with_its_first_end_of_sequence_token(tmp_path: Path) -> None:
    """The mask includes that token and nothing after it, and the text that is scored ends there."""
    policy = tiny_policy(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    tokenizer.eos_token = "e"  # noqa: S105 - a frequent token, so that completions end early
    torch.manual_seed(0)
    rollout = policy.sample(tokenizer, conversations(PROMPTS * 32), max_tokens=12)
    lengths = rollout.mask.sum(1).long().tolist()
    assert len(set(lengths)) > 1
    for tokens, length, text in zip(
        rollout.tokens[:, -rollout.mask.shape[1] :].tolist(), lengths, rollout.completions, strict=True
    ):
        end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
        assert length == end
        assert text == tokenizer.decode(tokens[:length], skip_special_tokens=True)


def test_only_the_topmost_layers_are_trained(tmp_path: Path) -> None:
    """With a number of layers, gradients exist for these alone; the value head changes no state."""
    policy = tiny_policy(tmp_path / "policy", trained_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    logprobs, values, _ = policy(policy.sample(tokenizer, conversations(PROMPTS), max_tokens=4))
    values.sum().backward(retain_graph=True)
    assert all(weight.grad is None for weight in policy.language_model.parameters())
    logprobs.sum().backward()
    trained = {
        name.split(".")[2] for name, weight in policy.language_model.named_parameters() if weight.grad is not None
    }
    assert trained == {"2"}


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_states_of_the_frozen_layers_are_computed_once(tmp_path: Path, family: str) -> None:
    """With the states of an earlier pass the results and gradients are the same, and the frozen layers do not run."""
    write_tiny_causal_lm(tmp_path / "policy", family, seed=3)
    policy = Policy(str(tmp_path / "policy"), torch.float32, 1, 1.0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    rollout = policy.sample(tokenizer, conversations(PROMPTS), max_tokens=4)
    expected = policy(rollout)
    expected[0].sum().backward()
    gradients = [weight.grad.clone() for weight in policy.parameters() if weight.grad is not None]
    policy.zero_grad()

    with pytest.MonkeyPatch.context() as patch:
        for layer in policy.language_model.base_model.layers[:-1]:
            patch.setattr(layer.mlp, "forward", None)  # fails if it is called
        found = policy(replace(rollout, frozen_states=expected[2]))
    found[0].sum().backward()

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    of_found = [weight.grad for weight in policy.parameters() if weight.grad is not None]
    assert gradients
    assert all(torch.equal(one, other) for one, other in zip(of_found, gradients, strict=True))
    assert torch.equal(policy(rollout)[0], expected[0])


def test_every_prompt_comes_once_before_any_comes_again() -> None:
    """Batches continue through a shuffled list and then through another."""
    batches = shuffled_forever(range(5), 2, seed=0)
    taken = [next(batches) for _ in range(5)]
    flat = [one for batch in taken for one in batch]
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5))


def test_prompts_are_texts_or_conversations(tmp_path: Path) -> None:
    """A text becomes a user turn; messages stay as they are."""
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi"},
        {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert read_prompts(path) == [[{"role": "user", "content": "Hi"}], rows[1]["prompt"]]


def run_options(tmp_path: Path, url: str, *more: str) -> list[str]:
    words = f"--url {url} --policy {tmp_path / 'policy'} --out {tmp_path / 'run'} --max-tokens 8 --learning-rate 1e-3"
    return [*words.split(), *more]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_loop_trains_with_the_rewards_of_the_service_and_logs_its_monitors(tmp_path: Path) -> None:
    """Every reward that was trained with is that of the service; the figures of a step have the diagnostics."""
    write_tiny_causal_lm(tmp_path / "policy", "llama", seed=3)
    model = write_calibrated_checkpoint(tmp_path / "reward-model")
    served = ("--model", str(model), "--dtype", "float32", "--monitors.batch_items", "32")
    with serving(tmp_path, *served, runtime="local") as server:
        with pytest.warns(match="KL reference"):
            main(run_options(tmp_path, server.url, "--steps", "4"))
        completions = rows_of(tmp_path / "run" / "completions.jsonl")
        with RewardClient(server.url) as client:
            expected = client.score([row["prompt"] for row in completions], [row["completion"] for row in completions])
    metrics = rows_of(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert [row["reward"] for row in completions] == pytest.approx(expected, abs=1e-5)
    assert metrics[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert metrics[-1]["kl"] > 1e-3
    for row in metrics:
        assert 0.0 < row["ood_p"] <= 1.0
        assert row["drift"] > 0.0
        assert (row["drift"] > 1.0) <= bool(row["alarms"])


@pytest.mark.slow
@pytest.mark.soak
def test_no_reward_is_made_up_when_the_service_is_gone(tmp_path: Path) -> None:
    """The step ends with the client's exception, and neither the policy nor the files change."""
    write_tiny_causal_lm(tmp_path / "policy", "llama", seed=3)
    model = write_tiny_checkpoint(tmp_path / "reward-model", "llama")
    with serving(tmp_path, "--model", str(model), runtime="local") as server, pytest.warns(match="KL reference"):
        main(run_options(tmp_path, server.url, "--steps", "1"))
    critic = Critic(server.url, "run", str(tmp_path / "policy"), deadline_s=3.0)
    options = parser().parse_args(run_options(tmp_path, server.url))
    trainer = Trainer(options, critic)
    before = [weight.clone() for weight in trainer.policy.parameters()]
    with pytest.raises(NoAnswer):
        trainer.step(conversations(PROMPTS))
    critic.close()
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.policy.parameters(), strict=True))
    assert len(rows_of(tmp_path / "run" / "metrics.jsonl")) == 1
