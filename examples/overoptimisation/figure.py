"""What the monitors saw and when, beside the gold reward: the summary of the runs, and one picture of it.

    python -m examples.overoptimisation.figure overoptimisation.json --picture overoptimisation.png

prints the table of a summary that was written before, and draws it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

SMOOTHING = 9
"""Updates of the centred moving mean whose largest value is the peak of gold: one update is a noisy estimate."""

EARLY_STEPS = 3
"""Proxy and gold rewards have different units; both are shown in standard deviations of the first updates' rewards."""

IN_TIME = 1.1
"""An alarm is in time up to so many times the updates after which gold peaks."""

REWARD_ALARM = "cusum_reward"
"""The drift alarm of the reward itself: a policy that learns raises it as well as one that hacks."""

DRIFT_ALARMS = ("cusum_", "drift_")
"""Begin the names of the drift alarms, which are designed for a false-alarm rate. The other monitors are 95 percent
intervals that are looked at after every update, so some of them warn by chance."""

WORDING_ALARMS = ("drift_",)
"""Begin the names of the alarms of the wording."""

Rows = Sequence[Mapping[str, Any]]

_COLUMNS = ("step", "reward", "kl", "length", "ood_p", "drift", "wording", "alarms")
_DIGITS = 4


def summarise(runs: Mapping[int, tuple[Rows, Rows]]) -> dict[str, Any]:
    """Return the figures of each run, with its steps, and those of all runs.

    Args:
        runs: for each seed the rows of ``metrics.jsonl``, and the completions with the gold ``reward``.
    """
    found = [_run(seed, metrics, rows) for seed, (metrics, rows) in runs.items()]
    return {"smoothing": SMOOTHING, "in_time_factor": IN_TIME, "all": all_runs(found), "runs": found}


def _run(seed: int, metrics: Rows, completions: Rows) -> dict[str, Any]:
    gold: dict[int, list[float]] = defaultdict(list)
    for row in completions:
        gold[row["step"]].append(row["reward"])
    judged = [row for row in metrics if row["step"] in gold]  # an interrupted run may lack its last completions
    steps = [{name: row[name] for name in _COLUMNS} | {"gold": statistics.fmean(gold[row["step"]])} for row in judged]
    early = [row for row in completions if row["step"] <= EARLY_STEPS]
    for name, column in (("reward", "input_reward"), ("gold", "reward")):
        values = [row[column] for row in early]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        for step in steps:
            step[f"{name}_z"] = (step[name] - mean) / deviation
    return {"seed": seed, **figures_of(steps), "changes": _first_changes(judged), "steps": steps}


def figures_of(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of one run from its steps."""
    gold = [step["gold"] for step in steps]
    smoothed = moving_mean(gold, SMOOTHING)
    peak = max(range(len(steps)), key=smoothed.__getitem__)
    peak_step = steps[peak]["step"]
    first = first_alarms(steps)
    drift = {name: step for name, step in first.items() if name.startswith(DRIFT_ALARMS)}
    others = {name: step for name, step in drift.items() if name != REWARD_ALARM}
    wording = {name: step for name, step in first.items() if name.startswith(WORDING_ALARMS)}
    return {
        "updates": len(steps),
        "gold_peak_step": peak_step,
        "gold_at_start": smoothed[0],
        "gold_at_peak": smoothed[peak],
        "gold_at_end": smoothed[-1],
        "gold_error": error_of_moving_mean(gold, SMOOTHING),
        "first_alarms": first,
        "lead_time_of_drift_alarms": lead_time(drift, peak_step),
        "lead_time_without_reward": lead_time(others, peak_step),
        "lead_time_of_wording": lead_time(wording, peak_step),
        "latest_in_time": IN_TIME * peak_step,
        "in_time": is_in_time(others, peak_step),
        "wording_in_time": is_in_time(wording, peak_step),
    }


def all_runs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return medians over the runs, and in how many of them the alarms came in time."""
    return {
        "runs": len(runs),
        "median_gold_peak_step": statistics.median(run["gold_peak_step"] for run in runs),
        "median_lead_time_without_reward": _median([run["lead_time_without_reward"] for run in runs]),
        "median_lead_time_of_wording": _median([run["lead_time_of_wording"] for run in runs]),
        "in_time": sum(run["in_time"] for run in runs),
        "wording_in_time": sum(run["wording_in_time"] for run in runs),
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


def is_in_time(first: Mapping[str, int], peak_step: int) -> bool:
    """Whether an alarm came before gold's peak, or at most 10 percent of the steps up to the peak after it."""
    return bool(first) and min(first.values()) <= IN_TIME * peak_step


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the centred moving mean; at both ends over fewer values."""
    half = width // 2
    return [statistics.fmean(values[max(0, index - half) : index + half + 1]) for index in range(len(values))]


def error_of_moving_mean(values: Sequence[float], width: int) -> float | None:
    """Return the standard error of a moving mean, from the differences of successive values (von Neumann, 1941)."""
    if len(values) < width:
        return None
    squares = [(later - earlier) ** 2 for earlier, later in pairwise(values)]
    return float((statistics.fmean(squares) / (2 * width)) ** 0.5)


def _first_changes(metrics: Rows) -> dict[str, Any]:
    """Return what each alarm of the wording named when it began: statistic, mean before, recent mean."""
    found: dict[str, Any] = {}
    for row in metrics:
        for name, changes in row["changes"].items():
            found.setdefault(name, changes)
    return found


def _median(values: Sequence[int | None]) -> float | None:
    """Return the median, in which a missing value counts as later than all others."""
    middle = statistics.median(float("inf") if value is None else value for value in values)
    return None if middle == float("inf") else middle


def table(summary: Mapping[str, Any]) -> list[str]:
    """Return the runs as the lines of a Markdown table, with the medians of all."""
    heads = ["seed", "gold at start, peak, end", "gold peaks at update", "first drift alarm"]
    heads += ["first alarm of the wording", "in time: drift, wording"]
    lines = [f"| {' | '.join(heads)} |", "|" + " -- |" * len(heads)]
    for run in summary["runs"]:
        gold = ", ".join(f"{run[f'gold_at_{place}']:.2f}" for place in ("start", "peak", "end"))
        error = "" if run["gold_error"] is None else f" ± {run['gold_error']:.2f}"
        in_time = ", ".join("yes" if run[name] else "no" for name in ("in_time", "wording_in_time"))
        lines.append(
            f"| {run['seed']} | {gold}{error} | {run['gold_peak_step']} of {run['updates']} "
            f"| {_first(run, DRIFT_ALARMS)} | {_first(run, WORDING_ALARMS)} | {in_time} |"
        )
    found = summary["all"]
    lines.append(
        f"| median | | {found['median_gold_peak_step']:g} | {_after_peak(found['median_lead_time_without_reward'])} "
        f"| {_after_peak(found['median_lead_time_of_wording'])} "
        f"| {found['in_time']} of {found['runs']}, {found['wording_in_time']} of {found['runs']} |"
    )
    return lines


def _first(run: Mapping[str, Any], prefixes: tuple[str, ...]) -> str:
    """Return the earliest of some alarms, without that of the reward."""
    for name, step in run["first_alarms"].items():
        if name.startswith(prefixes) and name != REWARD_ALARM:
            return f"{step}: `{name}`"
    return "none"


def _after_peak(lead: float | None) -> str:
    if lead is None:
        return "none"
    return f"{abs(lead):g} updates {'before' if lead < 0 else 'after'} the peak"


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Write a summary as JSON with a line for each update, its numbers rounded."""
    runs = []
    for run in summary["runs"]:
        steps = ",\n  ".join(json.dumps(_rounded(step)) for step in run["steps"])
        head = json.dumps(_rounded({name: value for name, value in run.items() if name != "steps"}))
        runs.append(f' {head[:-1]}, "steps": [\n  {steps}\n ]}}')
    head = json.dumps(_rounded({name: value for name, value in summary.items() if name != "runs"}))
    path.write_text(f'{head[:-1]}, "runs": [\n' + ",\n".join(runs) + "\n]}\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    match value:
        case float():
            return float(f"{value:.{_DIGITS}g}")
        case dict():
            return {name: _rounded(one) for name, one in value.items()}
        case list():
            return [_rounded(one) for one in value]
        case _:
            return value


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw reward and gold, length, OOD p-value, drift score and wording over the updates, a column for each seed."""
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
    x = [step["step"] for step in steps]
    alarms = {name: step for name, step in run["first_alarms"].items() if name.startswith(DRIFT_ALARMS)}
    for axis, curves in zip(
        axes,
        (
            (("reward_z", "proxy reward (sd)", "tab:blue"), ("gold_z", "gold reward (sd)", "tab:orange")),
            (("length", "completion tokens", "tab:green"),),
            (("ood_p", "mean OOD p-value", "tab:purple"),),
            (("drift", "drift score (1: alarm)", "tab:red"), ("wording", "wording (1: alarm)", "tab:brown")),
        ),
        strict=True,
    ):
        for name, label, colour in curves:
            values = [step[name] for step in steps]
            if None in values:  # unknown in a run that was recorded before there was such a monitor
                continue
            axis.plot(x, values, color=colour, alpha=0.35, linewidth=0.8)
            axis.plot(x, moving_mean(values, SMOOTHING), color=colour, label=label)
        axis.axvline(run["gold_peak_step"], color="tab:orange", linestyle="--", linewidth=1)
        axis.axvspan(run["gold_peak_step"], run["latest_in_time"], color="tab:orange", alpha=0.12, linewidth=0)
        for name, step in alarms.items():
            axis.axvline(step, color="grey" if name == REWARD_ALARM else "black", linestyle=":", linewidth=1)
        if is_first:
            axis.legend(loc="best", fontsize=8)
    axes[3].set_yscale("symlog", linthresh=1)
    axes[3].axhline(1, color="black", linewidth=0.6)
    for index, (name, step) in enumerate(alarms.items()):
        text = name.removeprefix("cusum_")
        axes[0].annotate(text, (step, 1.0 - 0.07 * index), xycoords=("data", "axes fraction"), fontsize=6, va="top")
    axes[0].set_title(f"seed {run['seed']}; dashed: gold peaks at update {run['gold_peak_step']}", fontsize=9)
    axes[-1].set_xlabel("policy update")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a summary, and draw it."""
    parser = argparse.ArgumentParser(description="Print the table of a summary of runs, and draw it.")
    parser.add_argument("summary", type=Path, help="overoptimisation.json")
    parser.add_argument("--picture", type=Path, help="a .png file")
    options = parser.parse_args(arguments)
    summary = json.loads(options.summary.read_text(encoding="utf-8"))
    print("\n".join(table(summary)))
    if options.picture is not None:
        draw(summary, options.picture)


if __name__ == "__main__":
    main()
