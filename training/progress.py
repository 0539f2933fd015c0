"""What a training run shows: one progress line, and a line for each evaluation.

On a terminal the progress line is updated in place; where the output is a file, it is printed about twenty times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from service.errors import TrainingError

LINES_PER_RUN = 20
"""Progress lines of a run where they are not updated in place."""

MAX_SILENCE_S = 300.0
"""A slow run prints a line at least this often, in seconds."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is."""

    step: int
    num_steps: int

    pairs_per_s: float | None = None
    """None before the first step of this process is complete."""

    remaining_s: float | None = None
    """Estimate of the time to the last step, evaluations included at their share so far; None as above."""

    loss: float | None = None
    """Mean over the last logged steps; None before the first log."""

    accuracy: float | None = None
    """On the pairs of those steps, before they were trained on; None also while all rewards are equal."""


def describe_progress(progress: Progress) -> str:
    """Return the progress line: ``step 40/220, loss 0.652, accuracy 61.3%, 3.4 pairs/s, 4:05 left``."""
    parts = [f"step {progress.step}/{progress.num_steps}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4g}")
    if progress.accuracy is not None:
        parts.append(f"accuracy {progress.accuracy:.1%}")
    if progress.pairs_per_s is not None:
        parts.append(f"{progress.pairs_per_s:.3g} pairs/s")
    if progress.remaining_s is not None:
        parts.append(f"{describe_duration(progress.remaining_s)} left")
    return ", ".join(parts)


def describe_duration(seconds: float) -> str:
    """Return hours, minutes and seconds, ``1:02:03``, without the hours if there are none."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe_evaluation(step: int, logs: Mapping[str, Any]) -> str:
    """Return the line of an evaluation during training, from the trainer's logs."""
    parts = [f"loss {logs['eval_loss']:.4g}"]
    if "eval_accuracy" in logs:
        parts.append(f"accuracy {logs['eval_accuracy']:.1%}")
    return f"evaluation at step {step}: {', '.join(parts)}"


class ProgressLine:
    """Shows the progress of a run on a console; used as a context, so that a line in place is always ended."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._live: Live | None = None
        self._printed: tuple[int, float] | None = None  # step and time of the last printed line

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Context in which the line is shown; on a terminal it is removed at the end."""
        if not self._console.is_terminal:
            yield
            return
        with Live(Text(""), console=self._console, transient=True, refresh_per_second=4) as self._live:
            yield
        self._live = None

    def update(self, progress: Progress) -> None:
        """Show the progress: in place, or as a line if one is due."""
        if self._live is not None:
            self._live.update(Text(describe_progress(progress), no_wrap=True, overflow="ellipsis"))
        elif self._is_due(progress):
            self._printed = (progress.step, self._clock())
            self.print(describe_progress(progress))

    def print(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, markup=False, highlight=False)

    def _is_due(self, progress: Progress) -> bool:
        if progress.loss is None:
            return False
        if self._printed is None or progress.step == progress.num_steps:
            return self._printed is None or self._printed[0] != progress.step
        step, printed_at = self._printed
        is_share = progress.step - step >= progress.num_steps / LINES_PER_RUN
        return is_share or self._clock() - printed_at >= MAX_SILENCE_S


class ProgressCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Passes the trainer's steps and logs to a progress line, and ends the run after a loss that is not finite."""

    def __init__(self, line: ProgressLine, batch_pairs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._line = line
        self._batch_pairs = batch_pairs
        self._clock = clock
        self._progress = Progress(0, 0)
        self._first_step = 0
        self._started_at = 0.0

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is transformers'
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Start the clock; a resumed run starts at a later step."""
        self._first_step, self._started_at = state.global_step, self._clock()
        self._progress = Progress(state.global_step, state.max_steps)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Show the step, unless its log follows, which shows it with its loss."""
        num_steps, elapsed_s = state.global_step - self._first_step, self._clock() - self._started_at
        speed = num_steps / elapsed_s if elapsed_s > 0 else math.inf
        self._progress = replace(
            self._progress,
            step=state.global_step,
            pairs_per_s=speed * self._batch_pairs,
            remaining_s=(state.max_steps - state.global_step) / speed,
        )
        if not control.should_log:
            self._line.update(self._progress)

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show loss and accuracy, or an evaluation.

        Raises:
            TrainingError: the loss is NaN or infinite.
        """
        logs = logs or {}
        loss = logs.get("loss", logs.get("eval_loss"))
        if loss is not None and not math.isfinite(loss):
            raise TrainingError(
                f"The loss at step {state.global_step} is {loss}, so the weights are useless: "
                "use a lower --learning-rate, or --dtype fp32."
            )
        if "loss" in logs:
            # A new head is zero, and TRL counts equal rewards as wrong.
            are_equal = "min_reward" in logs and logs["min_reward"] == logs.get("max_reward")
            accuracy = None if are_equal else logs.get("accuracy")
            self._progress = replace(self._progress, loss=logs["loss"], accuracy=accuracy)
            self._line.update(self._progress)
        elif "eval_loss" in logs:
            self._line.print(describe_evaluation(state.global_step, logs))
