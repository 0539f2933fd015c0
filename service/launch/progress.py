"""Show the progress of a start and a stop on the terminal."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.status import Status

from service.launch.browser import open_in_browser

_STAGES = {
    "checkpoint": "Checking the checkpoint",
    "ray": "Starting Ray",
    "serve": "Starting Ray Serve",
    "model": "Loading the model and warming up",
    "running": "Waiting for the first answer through HAProxy",
}
_EXAMPLE = """\
curl -s {url}/v1/score{key} -H 'Content-Type: application/json' -d '{{"items": [
  {{"prompt": "How do I boil an egg?", "completion": "Put it in boiling water for eight minutes."}},
  {{"prompt": "How do I boil an egg?", "completion": "No."}}]}}'"""


_KEY = ' -H "Authorization: Bearer $REWARD_API_KEY"'


class TerminalProgress:
    """Shows each stage: as a spinner on a terminal, as a plain line elsewhere.

    Args:
        console: where it is shown.
        url: address of the service.
        opens_page: whether a browser is to show the page once the service answers.
        needs_key: whether requests need an API key.
    """

    def __init__(self, console: Console, url: str, *, opens_page: bool = False, needs_key: bool = False) -> None:
        self._console = console
        self._url = url
        self._opens_page = opens_page
        self._needs_key = needs_key
        self._status: Status | None = None
        self._started_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_status()

    def stage(self, name: str) -> None:
        """Show that a stage has begun."""
        # While the checkpoint is checked a download may show its own progress, which a spinner would overwrite.
        self._show(_STAGES[name], spinner=name != "checkpoint")

    def ready(self, summary: str) -> None:
        """Show that the service answers, what it serves, and a request to paste."""
        self._end_status()
        elapsed_s = time.monotonic() - self._started_at
        example = _EXAMPLE.format(url=self._url, key=_KEY if self._needs_key else "")
        self._console.print(f"Ready in {elapsed_s:.0f} s: {self._url} serves {summary}.\n\n{example}\n", markup=False)
        if self._opens_page and not open_in_browser(self._url):
            self._console.print(f"There is no desktop here: open {self._url} in a browser.", markup=False)

    def note(self, sentence: str) -> None:
        """Show a sentence that stays."""
        self._end_status()
        self._console.print(sentence, markup=False, highlight=False)

    def stopping(self, *, ready: bool) -> None:
        """Show that the shutdown has begun, of a server that has been ready or of one that was starting."""
        self._show("Stopping: accepted requests are answered first" if ready else "Stopping the start")

    def _show(self, text: str, *, spinner: bool = True) -> None:
        self._end_status()
        if spinner and self._console.is_terminal:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._console.print(f"{text} ...", markup=False)

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None
