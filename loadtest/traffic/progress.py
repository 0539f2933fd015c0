"""Shows how a load test goes on: a line that is rewritten on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress

from rich.console import Console

from loadtest.traffic.execution import Tally

SECONDS_BETWEEN_LINES = 10.0


@asynccontextmanager
async def shown_progress(console: Console, tally: Tally) -> AsyncIterator[None]:
    """Show the counts until the block ends."""
    task = asyncio.create_task(_show(console, tally))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _show(console: Console, tally: Tally) -> None:
    began = time.monotonic()
    with console.status("", spinner="dots") if console.is_terminal else nullcontext() as status:
        while True:
            await asyncio.sleep(1.0 if status else SECONDS_BETWEEN_LINES)
            line = line_of(tally, time.monotonic() - began)
            if status:
                status.update(line)
            else:
                console.print(line, markup=False, highlight=False)


def line_of(tally: Tally, seconds: float) -> str:
    """Return the counts in one line."""
    answers = ", ".join(f"{count:,} x {status or 'no answer'}" for status, count in sorted(tally.by_status.items()))
    return f"{seconds:4.0f} s  {tally.phase}: {tally.sent:,} sent, {tally.open:,} open; {answers or 'no answer yet'}"
