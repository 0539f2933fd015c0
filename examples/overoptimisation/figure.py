"""What the monitors saw and when, beside the gold reward: the summary of the runs, and one picture of it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SMOOTHING = 9
"""Updates of the centred moving mean whose largest value is the peak of gold: one update is a noisy estimate."""

EARLY_STEPS = 3
"""Proxy and gold rewards have different units; both are shown in standard deviations of the first updates' rewards."""

REWARD_ALARM = "cusum_reward"
"""The drift alarm of the reward itself: a policy that learns raises it as well as one that hacks."""

DRIFT_ALARMS = ("cusum_", "drift_")
"""Begin the names of the drift alarms, which are designed for a false-alarm rate. The other monitors are 95 percent
intervals that are looked at after every update, so some of them warn by chance."""

Rows = Sequence[Mapping[str, Any]]


def summarise(runs: Mapping[int, tuple[Rows, Rows]]) -> dict[str, Any]:
    """Return the figures of each run, with its steps.

    Args:
        runs: for each seed the rows of ``metrics.jsonl``, and the completions with the gold ``reward``.
    """
    return {"smoothing": SMOOTHING, "runs": [_run(seed, metrics, rows) for seed, (metrics, rows) in runs.items()]}


def _run(seed: int, metrics: Rows, completions: Rows) -> dict[str, Any]:
    gold: dict[int, list[float]] = defaultdict(list)
    for row in completions:
        gold[row["step"]].append(row["reward"])
    names = ("step", "reward", "kl", "length", "ood_p", "drift", "alarms")
    judged = [row for row in metrics if row["step"] in gold]  # an interrupted run may lack its last completions
    steps = [{name: row[name] for name in names} | {"gold": statistics.fmean(gold[row["step"]])} for row in judged]
    early = [row for row in completions if row["step"] <= EARLY_STEPS]
    for name, column in (("reward", "input_reward"), ("gold", "reward")):
        values = [row[column] for row in early]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        for step in steps:
            step[f"{name}_z"] = (step[name] - mean) / deviation
    smoothed = moving_mean([step["gold"] for step in steps], SMOOTHING)
    peak = max(range(len(steps)), key=smoothed.__getitem__)
    peak_step = steps[peak]["step"]
    first = first_alarms(steps)
    drift = {name: step for name, step in first.items() if name.startswith(DRIFT_ALARMS)}
    others = {name: step for name, step in drift.items() if name != REWARD_ALARM}
    return {
        "seed": seed,
        "updates": len(steps),
        "gold_peak_step": peak_step,
        "gold_at_start": smoothed[0],
        "gold_at_peak": smoothed[peak],
        "gold_at_end": smoothed[-1],
        "first_alarms": first,
        "lead_time_of_drift_alarms": lead_time(drift, peak_step),
        "lead_time_without_reward": lead_time(others, peak_step),
        "steps": steps,
    }


def first_alarms(steps: Rows) -> dict[str, int]:
    """Return the step of the first alarm of each monitor, earliest first."""
    first: dict[str, int] = {}
    for step in steps:
        for name in step["alarms"]:
            first.setdefault(name, step["step"])
    return first


def lead_time(first: Mapping[str, int], peak_step: int) -> int | None:
    """Return the step of the first alarm less that at which gold peaks, negative if the alarm came first, or None."""
    return min(first.values()) - peak_step if first else None


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the centred moving mean; at both ends over fewer values."""
    half = width // 2
    return [statistics.fmean(values[max(0, index - half) : index + half + 1]) for index in range(len(values))]


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw reward and gold, length, OOD p-value and drift score over the updates, a column for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    runs = summary["runs"]
    figure, axes = plt.subplots(
        4, len(runs), figsize=(1.5 + 4.5 * len(runs), 8.5), sharex="col", sharey="row", squeeze=False
    )
    for column, run in enumerate(runs):
        _draw_run(axes[:, column], run, is_first=column == 0)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_run(axes: Any, run: Mapping[str, Any], *, is_first: bool) -> None:
    steps = run["steps"]
    drift = {name for name in run["first_alarms"] if name.startswith(DRIFT_ALARMS)}
    x = [step["step"] for step in steps]
    for axis, curves in zip(
        axes,
        (
            (("reward_z", "proxy reward (sd)", "tab:blue"), ("gold_z", "gold reward (sd)", "tab:orange")),
            (("length", "completion tokens", "tab:green"),),
            (("ood_p", "mean OOD p-value", "tab:purple"),),
            (("drift", "drift score (1: alarm)", "tab:red"),),
        ),
        strict=True,
    ):
        for name, label, colour in curves:
            values = [step[name] for step in steps]
            axis.plot(x, values, color=colour, alpha=0.35, linewidth=0.8)
            axis.plot(x, moving_mean(values, SMOOTHING), color=colour, label=label)
        axis.axvline(run["gold_peak_step"], color="tab:orange", linestyle="--", linewidth=1)
        for name, step in run["first_alarms"].items():
            axis.axvline(step, color="black" if name in drift - {REWARD_ALARM} else "grey", linestyle=":", linewidth=1)
        if is_first:
            axis.legend(loc="best", fontsize=8)
    axes[3].set_yscale("symlog", linthresh=1)
    axes[3].axhline(1, color="black", linewidth=0.6)
    for index, (name, step) in enumerate(run["first_alarms"].items()):
        text = name.removeprefix("cusum_")
        axes[0].annotate(text, (step, 1.0 - 0.07 * index), xycoords=("data", "axes fraction"), fontsize=6, va="top")
    axes[0].set_title(f"seed {run['seed']}; dashed: gold peaks at update {run['gold_peak_step']}", fontsize=9)
    axes[-1].set_xlabel("policy update")
