"""The progress of a training run: one line, in place or about twenty times, and a line for each evaluation."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from service.errors import TrainingError
from training.progress import (
    MAX_SILENCE_S,
    Progress,
    ProgressCallback,
    ProgressLine,
    describe_duration,
    describe_progress,
)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def file_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def callback(console: Console, clock: Clock, num_steps: int, first_step: int = 0) -> tuple[ProgressCallback, Any]:
    progress = ProgressCallback(ProgressLine(console, clock), batch_pairs=16, clock=clock)
    state = SimpleNamespace(global_step=first_step, max_steps=num_steps)
    progress.on_train_begin(None, state, None)
    return progress, state


def take_step(progress: ProgressCallback, state: Any, logs: dict[str, float] | None = None) -> None:
    state.global_step += 1
    progress.on_step_end(None, state, SimpleNamespace(should_log=logs is not None))
    if logs is not None:
        progress.on_log(None, state, None, logs)


def test_the_line_has_step_loss_accuracy_speed_and_remaining_time() -> None:
    """The figures have their units, and those that are not known yet are left out."""
    progress = Progress(40, 220, pairs_per_s=3.42, remaining_s=245, loss=0.65213, accuracy=0.6125)

    assert describe_progress(progress) == "step 40/220, loss 0.6521, accuracy 61.3%, 3.42 pairs/s, 4:05 left"
    assert describe_progress(Progress(0, 220)) == "step 0/220"
    assert describe_duration(3723) == "1:02:03"


def test_speed_and_remaining_time_are_those_of_this_process() -> None:
    """A resumed run counts its own steps only: 2 steps of 16 pairs in 8 s are 4 pairs/s, and 8 steps take 32 s."""
    console, clock = file_console(), Clock()
    progress, state = callback(console, clock, num_steps=20, first_step=10)

    for _ in range(2):
        clock.now_s += 4
        take_step(progress, state, {"loss": 0.5, "accuracy": 0.75})

    assert lines(console)[-1] == "step 12/20, loss 0.5, accuracy 75.0%, 4 pairs/s, 0:32 left"


def test_a_file_receives_about_twenty_lines() -> None:
    """The first, the last, and between them one for every twentieth of the run."""
    console, clock = file_console(), Clock()
    progress, state = callback(console, clock, num_steps=1000)

    for _ in range(1000):
        clock.now_s += 0.01
        take_step(progress, state, {"loss": 0.5} if state.global_step % 10 == 0 else None)

    printed = lines(console)
    assert 19 <= len(printed) <= 23
    assert printed[-1].startswith("step 1000/1000")


def test_a_slow_run_is_not_silent() -> None:
    """A line is due after five minutes, however few steps were made."""
    console, clock = file_console(), Clock()
    progress, state = callback(console, clock, num_steps=100_000)

    for _ in range(3):
        take_step(progress, state, {"loss": 0.5})
        clock.now_s += MAX_SILENCE_S + 1

    assert len(lines(console)) == 3


def test_a_terminal_has_one_line_in_place() -> None:
    """Nothing of the progress stays on the terminal but the evaluations."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    line = ProgressLine(console)

    with line.shown():
        for step in range(50):
            line.update(Progress(step, 50, loss=0.5))
        line.print("evaluation at step 50")

    assert isinstance(console.file, io.StringIO)
    written = console.file.getvalue()
    assert "evaluation at step 50\n" in written
    assert written.count("step 49/50") <= 2


def test_an_evaluation_has_its_own_line() -> None:
    """Step, loss and accuracy of the evaluation; no raw dictionary."""
    console, clock = file_console(), Clock()
    progress, state = callback(console, clock, num_steps=10)
    take_step(progress, state)

    progress.on_log(None, state, None, {"eval_loss": 0.6931, "eval_accuracy": 0.5, "eval_runtime": 3.2})

    assert lines(console) == ["evaluation at step 1: loss 0.6931, accuracy 50.0%"]


def test_equal_rewards_have_no_accuracy() -> None:
    """While the head is zero all pairs are ties, which TRL would count as wrong."""
    console, clock = file_console(), Clock()
    progress, state = callback(console, clock, num_steps=10)

    take_step(progress, state, {"loss": 0.6931, "accuracy": 0.0, "min_reward": 0.0, "max_reward": 0.0})

    assert "accuracy" not in lines(console)[0]


@pytest.mark.parametrize("logs", [{"loss": float("nan")}, {"eval_loss": float("inf")}])
def test_a_loss_that_is_not_finite_ends_the_run(logs: dict[str, float]) -> None:
    """Training on would only write useless weights; the message names the step and the remedy."""
    progress, state = callback(file_console(), Clock(), num_steps=10)

    with pytest.raises(TrainingError, match=r"step 1 .*--learning-rate"):
        take_step(progress, state, logs)
