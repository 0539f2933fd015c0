"""What commands show of their progress, on a terminal and in a file."""

from __future__ import annotations

import io

from rich.console import Console

from service.console import progress_bar, stages


def test_stages_are_plain_lines_in_a_file() -> None:
    """Without a terminal every stage is one line, and brackets in its name are no markup."""
    output = io.StringIO()

    with stages(Console(file=output, force_terminal=False)) as stage:
        stage("Validating [a] checkpoint")
        stage("Tracing")

    assert output.getvalue() == "Validating [a] checkpoint\nTracing\n"


def test_stages_on_a_terminal_show_the_running_one() -> None:
    """On a terminal the stages that began are shown."""
    output = io.StringIO()

    with stages(Console(file=output, force_terminal=True, width=80)) as stage:
        stage("Validating [a] checkpoint")
        stage("Tracing")

    assert "Validating [a] checkpoint" in output.getvalue()
    assert "Tracing" in output.getvalue()


def test_the_bar_counts_items() -> None:
    """The bar shows how many of all items are complete."""
    output = io.StringIO()

    with progress_bar(Console(file=output, force_terminal=True, width=100), "Scoring", 5) as advance:
        advance(2)
        advance(3)

    assert "5/5" in output.getvalue()
