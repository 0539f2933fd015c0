"""Reward model overoptimisation in the synthetic set-up of Gao, Schulman and Hilton (2022, arXiv 2210.10760).

    python -m examples.overoptimisation.run --prompts prompts.jsonl --out overoptimisation

The demo model is the gold reward model, a stand-in for people. A smaller proxy is trained on pairs that the gold model
has labelled, calibrated on completions of the initial policy, and served. PPO trains a policy against the proxy with
hardly any KL penalty; the policy never sees the gold rewards, which are computed afterwards.

Each stage writes one file or folder and is skipped where that exists, so an interrupted run is continued by the same
command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from reward_client import RewardClient

from examples.overoptimisation.figure import draw, summarise, table, write_summary
from examples.overoptimisation.samples import labelled_pairs, read_rows, sample, write_first_blocks, write_rows
from examples.ppo.ppo import Policy

PPO = Path(__file__).parents[1] / "ppo" / "ppo.py"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all stages that are not done yet."""
    options = _parser().parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    policy = options.policy or str(_demo_base())
    label, calibrate, train = _split_prompts(options)
    _sample_completions(options, policy, {"labelled": (label, options.completions), "normal": (calibrate, 2)})
    _make_proxy(options, policy)
    with _stage(out / "prompts.jsonl") as target:
        if target:
            write_rows(target, [{"prompt": prompt} for prompt in train])
    for seed in options.seeds:
        _train_policy(options, policy, seed)
    runs = {seed: out / f"seed-{seed}" for seed in options.seeds}
    for run in runs.values():
        _command(
            "score",
            run / "completions.jsonl",
            run / "gold.jsonl",
            "--model",
            options.gold,
            *_QUIET,
            made=run / "gold.jsonl",
        )
    summary = summarise(
        {seed: (read_rows(run / "metrics.jsonl"), read_rows(run / "gold.jsonl")) for seed, run in runs.items()}
    )
    write_summary(summary, out / "overoptimisation.json")
    draw(summary, out / "overoptimisation.png")
    for run in summary["runs"]:
        print(json.dumps({name: value for name, value in run.items() if name != "steps"}))
    print("\n".join(table(summary)))


_QUIET = ("--diagnostics", "none")


def _sample_completions(
    options: argparse.Namespace, policy: str, files: Mapping[str, tuple[Sequence[str], int]]
) -> None:
    """Write the completions of the initial policy: for each name of a file its prompts, and how many of each."""
    if all((options.out / f"{name}.jsonl").exists() for name in files):
        return
    torch.manual_seed(options.seeds[0])
    initial = Policy(policy, getattr(torch, options.dtype), 0, options.temperature)
    for name, (prompts, count) in files.items():
        with _stage(options.out / f"{name}.jsonl") as target:
            if target:
                sample(target, prompts, count, policy=initial, folder=policy, max_tokens=options.max_tokens)


def _make_proxy(options: argparse.Namespace, policy: str) -> None:
    """Train the proxy on pairs that gold has labelled, and calibrate it on completions of the initial policy."""
    out: Path = options.out
    _command(
        "score", out / "labelled.jsonl", out / "gold.jsonl", "--model", options.gold, *_QUIET, made=out / "gold.jsonl"
    )
    with _stage(out / "pairs.jsonl") as target:
        if target:
            write_rows(target, labelled_pairs(read_rows(out / "gold.jsonl")))
    with _stage(out / "proxy-base") as target:
        if target:
            write_first_blocks(policy, target, options.proxy_blocks)
    recipe = ["--hold-out-percent", 10, "--max-length", 256, "--epochs", options.proxy_epochs, "--learning-rate", 1e-3]
    recipe += ["--lora-layers", options.proxy_trained_blocks, "--micro-batch-pairs", 16]
    _command(
        *("train", "--data", out / "pairs.jsonl", "--base", out / "proxy-base", "--out", out / "proxy-adapter"),
        *("--merge", out / "proxy", *recipe),
        made=out / "proxy",
    )
    calibration = out / "proxy" / "calibration.safetensors"
    _command("calibrate", out / "proxy", out / "normal.jsonl", "--items-per-set", 25, "--force", made=calibration)


def _train_policy(options: argparse.Namespace, policy: str, seed: int) -> None:
    """Serve the proxy, and train the policy against it."""
    run = options.out / f"seed-{seed}"
    with _stage(run) as target:
        if not target:
            return
        shutil.rmtree(target, ignore_errors=True)
        with _serving(options) as url:
            settings = {
                "--url": url,
                "--policy": policy,
                "--prompts": options.out / "prompts.jsonl",
                "--out": target,
                "--steps": options.steps,
                "--prompts-per-step": options.prompts_per_step,
                "--completions": options.completions,
                "--max-tokens": options.max_tokens,
                "--temperature": options.temperature,
                "--kl": options.kl,
                "--learning-rate": options.learning_rate,
                "--trained-layers": options.trained_layers,
                "--epochs": options.epochs,
                "--dtype": options.dtype,
                "--seed": seed,
            }
            words = [str(word) for pair in settings.items() for word in pair]
            subprocess.run([sys.executable, str(PPO), *words], check=True)  # noqa: S603 - our own command


@contextlib.contextmanager
def _serving(options: argparse.Namespace) -> Iterator[str]:
    """Serve the proxy while the body runs; its monitors take one step per policy update, or few."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", options.out / "proxy", "--runtime", "local", "--port", port]
    words += ["--monitors.batch_items", options.prompts_per_step * options.completions]
    words += ["--monitors.drift_prompts", max(options.drift_prompts, options.prompts_per_step)]
    with (options.out / "service.log").open("a") as log:
        service = subprocess.Popen(_reward_command("serve", *words), stdout=log, stderr=log)  # noqa: S603 - our own
    try:
        url = f"http://127.0.0.1:{port}"
        with RewardClient(url, wait_for_start_s=600) as client:
            client.wait_until_ready()
        yield url
    finally:
        service.terminate()
        service.wait()


@contextlib.contextmanager
def _stage(target: Path) -> Iterator[Path | None]:
    """Yield a path to write to, which gets its name once the body has succeeded; None where the target exists."""
    if target.exists():
        yield None
        return
    print(f"making {target}", flush=True)
    unfinished = target.with_name(f"unfinished-{target.name}")
    yield unfinished
    unfinished.rename(target)


def _command(name: str, *words: Any, made: Path) -> None:
    """Run a command of the repository unless what it makes is there."""
    if not made.exists():
        print(f"making {made}", flush=True)
        if name == "train":
            words = (*words, "--overwrite")
        if name == "score":
            words = (*words, "--resume")
        subprocess.run(_reward_command(name, *words), check=True)  # noqa: S603 - our own command


def _reward_command(name: str, *words: Any) -> list[str]:
    call = f"import sys; from service.commands import reward_{name}; sys.exit(reward_{name}())"
    return [sys.executable, "-c", call, *(str(word) for word in words)]


def _split_prompts(options: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """Return disjoint prompts: to train the proxy, to calibrate it, and to train the policy."""
    prompts = list(dict.fromkeys(row["prompt"] for row in read_rows(options.prompts)))
    random.Random(0).shuffle(prompts)  # noqa: S311 - an order, not a secret
    first, second = options.label_prompts, options.label_prompts + options.calibration_prompts
    if len(prompts) <= second:
        raise SystemExit(f"{options.prompts} has {len(prompts)} prompts; more than {second} are needed")
    return prompts[:first], prompts[first:second], prompts[second:]


def _demo_base() -> Path:
    from service.checkpoints.demo_base import obtain_demo_base

    return obtain_demo_base()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--prompts", type=Path, required=True, help="JSON lines with a prompt each: short texts of one user turn")
    add("--out", type=Path, default=Path("overoptimisation"), help="folder of all files")
    add("--policy", help="folder or hub id of a causal LM with a chat template; without it: SmolLM2-135M")
    add("--gold", default="demo", help="reward model that labels and judges")
    add("--seeds", type=int, nargs="+", default=[0], help="one run of PPO for each")
    add("--label-prompts", type=int, default=300, help="prompts of the pairs that the proxy is trained on")
    add("--calibration-prompts", type=int, default=400, help="prompts of the calibration, two completions each")
    add("--proxy-blocks", type=int, default=6, help="the proxy's body: so many of the policy's first blocks")
    add("--proxy-trained-blocks", type=int, default=2, help="topmost blocks of the proxy that are adapted")
    add("--proxy-epochs", type=float, default=1, help="passes over the pairs in training the proxy")
    add("--steps", type=int, default=100, help="policy updates")
    add("--prompts-per-step", type=int, default=16)
    add("--completions", type=int, default=4, help="completions of a prompt, for pairs and in PPO")
    add("--drift-prompts", type=int, default=32, help="prompts of a batch of the drift of the wording, 16 to 1024")
    add("--max-tokens", type=int, default=32, help="longest completion")
    add("--temperature", type=float, default=0.7, help="of the policy")
    add("--kl", type=float, default=0.0, help="weight of the KL penalty")
    add("--learning-rate", type=float, default=2e-4, help="of the policy")
    add("--trained-layers", type=int, default=6, help="topmost layers of the policy that are trained")
    add("--epochs", type=int, default=1, help="passes of PPO over the completions of an update")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the policy's computation")
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
