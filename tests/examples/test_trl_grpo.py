"""The TRL example against real servers: GRPO while a replica is killed, and RLOO."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from reward_client import RewardClient
from serving import RunningServer, eventually, serving
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "trl_grpo" / "grpo.py"
STEPS = 20
KILL_AFTER = 5
RLOO_STEPS = 3


@pytest.mark.soak
def test_it_completes_with_true_rewards_when_a_replica_is_killed(tmp_path: Path) -> None:
    """All steps are done; every reward that was trained with is that of the service, and none was made up."""
    reward_model = write_tiny_checkpoint(tmp_path / "reward-model", "llama")
    policy = write_tiny_causal_lm(tmp_path / "policy", "llama", seed=3)
    run = tmp_path / "run"
    options = ("--model", str(reward_model), "--dtype", "float32", "--num-threads", "1")
    with serving(tmp_path, *options) as server:
        with (tmp_path / "output.txt").open("wb") as output:
            training = subprocess.Popen(
                command(server, policy, run, STEPS),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        try:
            assert eventually(lambda: len(rows(run / "metrics.jsonl")) >= KILL_AFTER, 120)
            [replica] = replicas(server)
            replica.kill()
            assert training.poll() is None, "the training ended before the replica was killed"
            assert training.wait(300) == 0, (tmp_path / "output.txt").read_text()
        finally:
            training.kill()
            training.wait()
        assert replicas(server)
        assert replica not in replicas(server)

        completions, metrics = rows(run / "completions.jsonl"), rows(run / "metrics.jsonl")
        with RewardClient(server.url, deadline_s=120) as client:
            prompts, texts = [row["prompt"] for row in completions], [row["completion"] for row in completions]
            expected = client.score(prompts, texts)

    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert [row["reward"] for row in completions] == pytest.approx(expected, abs=1e-5)
    for row in metrics:
        used = [entry["reward"] for entry in completions if entry["step"] == row["step"]]
        assert len(used) == 8
        assert row["reward"] == pytest.approx(statistics.fmean(used), abs=1e-5)
        assert row["reward_model/scored_tokens"] > 0


def test_rloo_logs_the_diagnostics(tmp_path: Path) -> None:
    """A few steps of RLOO: each logs the mean reward of its completions and the diagnostics of the service."""
    reward_model = write_tiny_checkpoint(tmp_path / "reward-model", "llama")
    policy = write_tiny_causal_lm(tmp_path / "policy", "llama", seed=3)
    run = tmp_path / "run"
    with serving(tmp_path, "--model", str(reward_model), "--num-threads", "1", runtime="local") as server:
        finished = subprocess.run(
            [*command(server, policy, run, RLOO_STEPS), "--method", "rloo"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )

    assert finished.returncode == 0, finished.stderr
    metrics, completions = rows(run / "metrics.jsonl"), rows(run / "completions.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, RLOO_STEPS + 1))
    for row in metrics:
        used = [entry["reward"] for entry in completions if entry["step"] == row["step"]]
        assert row["reward"] == pytest.approx(statistics.fmean(used), abs=1e-5)
        assert row["reward_model/scored_tokens"] > 0
        assert row["reward_model/truncated"] == 0.0


def command(server: RunningServer, policy: Path, run: Path, steps: int) -> list[str]:
    """The example with a tiny policy, 8 completions of 8 tokens for each step."""
    options = f"--url {server.url} --policy {policy} --out {run} --steps {steps} --generations 4 --max-tokens 8"
    return [sys.executable, str(EXAMPLE), *options.split()]


def replicas(server: RunningServer) -> list[psutil.Process]:
    """The processes that hold the model."""
    return [process for process in server.descendants() if "ServeReplica" in " ".join(process.cmdline())]


def rows(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of JSON lines; none if it does not exist yet."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
