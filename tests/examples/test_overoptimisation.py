"""The parts of the overoptimisation run that decide what it reports: pairs, the proxy's body, peak and lead time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_calibration import made_up_text
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForCausalLM

from examples.overoptimisation.figure import (
    draw,
    error_of_moving_mean,
    first_alarms,
    is_in_time,
    lead_time,
    moving_mean,
    summarise,
    table,
    write_summary,
)
from examples.overoptimisation.run import main
from examples.overoptimisation.samples import labelled_pairs, read_rows, write_first_blocks, write_rows


def test_pairs_are_all_of_a_prompt_and_gold_chooses() -> None:
    """Three completions make three pairs; equal rewards and equal texts make none; prompts are not mixed."""
    rows = [
        {"prompt": "a", "completion": "low", "reward": 0.0},
        {"prompt": "b", "completion": "other", "reward": 9.0},
        {"prompt": "a", "completion": "high", "reward": 2.0},
        {"prompt": "a", "completion": "mid", "reward": 1.0},
        {"prompt": "a", "completion": "tie", "reward": 1.0},
        {"prompt": "b", "completion": "other", "reward": 8.0},
    ]
    pairs = {(pair["chosen"], pair["rejected"]) for pair in labelled_pairs(rows)}
    assert pairs == {("high", "low"), ("mid", "low"), ("tie", "low"), ("high", "mid"), ("high", "tie")}


def test_the_first_blocks_compute_what_they_compute_in_the_whole_model(tmp_path: Path) -> None:
    """The states after two of three blocks are those of the whole model, before its last norm."""
    folder = write_tiny_causal_lm(tmp_path / "policy", "llama", dtype="bfloat16")
    write_first_blocks(str(folder), tmp_path / "body", 2)
    tokens = torch.arange(5, 15)[None]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    body = AutoModelForCausalLM.from_pretrained(tmp_path / "body", dtype=torch.bfloat16).eval()
    assert body.config.num_hidden_layers == 2
    expected = whole(tokens, output_hidden_states=True).hidden_states[2]
    states = body(tokens, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(states, body.base_model.norm(expected))


def test_the_lead_time_is_that_of_the_earliest_alarm() -> None:
    """Negative before the peak of gold, positive after it, and None where there was no alarm."""
    steps = [{"step": 1, "alarms": []}, {"step": 2, "alarms": ["b"]}, {"step": 3, "alarms": ["a", "b"]}]
    first = first_alarms(steps)
    assert first == {"b": 2, "a": 3}
    assert lead_time(first, 5) == -3
    assert lead_time(first, 1) == 1
    assert lead_time({}, 5) is None


def test_the_moving_mean_is_centred() -> None:
    """A straight line stays what it is, except at its ends."""
    assert moving_mean([0.0, 1.0, 2.0, 3.0, 4.0], 3) == [0.5, 1.0, 2.0, 3.0, 3.5]


def test_an_alarm_is_in_time_up_to_a_tenth_after_the_peak() -> None:
    """Of a peak at update 20, update 22 is the last in time; an alarm that never comes is not."""
    assert is_in_time({"a": 22, "b": 40}, 20)
    assert not is_in_time({"a": 23}, 20)
    assert not is_in_time({}, 20)


def test_the_error_of_the_moving_mean_is_that_of_noise_and_not_of_a_trend() -> None:
    """Independent noise of standard deviation 2 about a slope: the mean of nine has an error of two thirds."""
    rng = random.Random(0)
    values = [0.05 * step + rng.gauss(0.0, 2.0) for step in range(2000)]
    assert error_of_moving_mean(values, 9) == pytest.approx(2 / 3, rel=0.05)
    assert error_of_moving_mean(values[:8], 9) is None


def staged_run(num_steps: int, peak: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The proxy reward rises for ever, gold falls after the peak; two drift alarms after a warning by chance."""
    metrics, rows = [], []
    for step in range(1, num_steps + 1):
        alarms = ["ood_rate"] * (step == 2) + ["cusum_reward"] * (step >= 4) + ["cusum_surprise"] * (step >= 12)
        alarms += ["drift_start"] * (step >= 30)
        metrics.append(
            {"step": step, "reward": float(step), "kl": 0.1, "length": 30.0, "ood_p": 0.5, "drift": 0.1 * step}
            | {
                "wording": 0.03 * step,
                "alarms": alarms,
                "changes": {"drift_start": [["words", 9, step]]} if step >= 30 else {},
            }
        )
        gold = float(min(step, 2 * peak - step))
        rows += [{"step": step, "input_reward": step + noise, "reward": gold + noise} for noise in (-0.5, 0.5)]
    return metrics, rows


def test_a_staged_run_is_summarised_and_drawn(tmp_path: Path) -> None:
    """Peaks, lead times and what came in time are those that were staged; what is committed of them is small."""
    summary = summarise({0: staged_run(60, 20), 1: staged_run(60, 40)})
    assert [run["gold_peak_step"] for run in summary["runs"]] == [20, 40]
    assert [run["lead_time_of_drift_alarms"] for run in summary["runs"]] == [-16, -36]
    assert [run["lead_time_without_reward"] for run in summary["runs"]] == [-8, -28]
    assert [run["lead_time_of_wording"] for run in summary["runs"]] == [10, -10]
    assert [run["wording_in_time"] for run in summary["runs"]] == [False, True]
    assert [run["changes"] for run in summary["runs"]] == [{"drift_start": [["words", 9, 30]]}] * 2
    assert summary["all"] == {
        "runs": 2,
        "median_gold_peak_step": 30,
        "median_lead_time_without_reward": -18,
        "median_lead_time_of_wording": 0,
        "in_time": 2,
        "wording_in_time": 1,
    }
    assert table(summary)[2].startswith("| 0 | ")
    assert "| 12: `cusum_surprise` | 30: `drift_start` | yes, no |" in table(summary)[2]
    write_summary(summary, tmp_path / "summary.json")
    assert (tmp_path / "summary.json").stat().st_size < 400 * 120
    assert json.loads((tmp_path / "summary.json").read_text())["all"] == summary["all"]
    assert summary["runs"][0]["steps"][0]["gold"] == pytest.approx(1.0)
    draw(summary, tmp_path / "picture.png")
    assert 10_000 < (tmp_path / "picture.png").stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_command_runs_every_stage_and_then_none_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From prompts to the picture with tiny models: the judged completions are those that were trained with."""
    policy = write_tiny_causal_lm(tmp_path / "policy", "llama", seed=3)
    gold = write_tiny_checkpoint(tmp_path / "gold-model", "llama", seed=5)
    rng, out = random.Random(0), tmp_path / "out"
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{made_up_text(rng, 1)} {index}"} for index in range(420)])
    words = f"--prompts {tmp_path / 'prompts.jsonl'} --out {out} --policy {policy} --gold {gold} --dtype float32"
    words += " --label-prompts 40 --calibration-prompts 360 --proxy-blocks 2 --proxy-trained-blocks 1"
    words += " --trained-layers 1 --max-tokens 12 --steps 3 --prompts-per-step 8 --temperature 1.0"
    main(words.split())
    summary = json.loads((out / "overoptimisation.json").read_text())
    [run] = summary["runs"]
    assert [step["step"] for step in run["steps"]] == [1, 2, 3]
    assert (out / "overoptimisation.png").is_file()
    trained, judged = (read_rows(out / "seed-0" / name) for name in ("completions.jsonl", "gold.jsonl"))
    assert [row["reward"] for row in trained] == [row["input_reward"] for row in judged]
    assert capsys.readouterr().out.count("making ") == 9
    main(words.split())
    assert "making " not in capsys.readouterr().out
