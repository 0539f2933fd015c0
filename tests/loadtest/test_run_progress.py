"""The progress of a measurement is visible while a step runs, with an estimate of the time that is left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from loadtest.run_progress import RunProgress, RunTimeEstimate, duration


def test_time_is_in_proportion_to_the_latest_step_of_the_same_kind() -> None:
    """Two kinds by hand: 2 s for 4 tokens, then 3 s for 10 tokens of the same kind, and 1 s for another kind."""
    estimate = RunTimeEstimate()
    estimate.observe("a", 4, 2.0)
    estimate.observe("a", 10, 3.0)

    assert estimate.seconds_for([("a", 20), ("b", 1)]) is None
    estimate.observe("b", 1, 1.0)
    assert estimate.seconds_for([("a", 20), ("b", 1), ("b", 1)]) == pytest.approx(8.0)


def test_a_step_that_takes_long_is_shown_while_it_runs() -> None:
    """Without a terminal there is a line at each interval, with the step and the time that is left."""
    output = io.StringIO()
    with RunProgress(Console(file=output, width=130), every_s=0.02) as progress:
        progress.tell("groups of 8: plain", 2, 9, 200.0)
        deadline = time.monotonic() + 5
        while output.getvalue().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)

    assert "groups of 8: plain, step 3 of 9, about 3 min 20 s left" in output.getvalue().splitlines()[-1]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s")])
def test_durations_are_rounded_to_seconds(seconds: float, words: str) -> None:
    """A minute is never shown as 60 seconds."""
    assert duration(seconds) == words
