"""One JSON line per request: counts, durations, identifiers and the error's code, never a text of a user.

Lines are written by a thread of their own, so a log that nobody reads cannot hold up an answer; what does not fit the
short queue in front of it is dropped. It does not decide what is worth a line; that is for the routes.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_WAITING_LINES = 10_000
CLOSE_S = 1.0
"""How long the end waits for a reader that stands still."""
STDERR = 2
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class Journal:
    """An open log. ``path``: a file that is appended to; none: standard error, which Ray keeps with its own logs."""

    def __init__(self, path: str | None = None) -> None:
        # A bare descriptor: a line is one write, so the lines of several replicas do not mix.
        self._descriptor = os.dup(STDERR) if path is None else os.open(path, APPEND, 0o644)
        self._waiting: queue.Queue[bytes | None] = queue.Queue(MAX_WAITING_LINES)
        self._writer = threading.Thread(target=self._write_all, name="journal", daemon=True)
        self._writer.start()

    @property
    def num_waiting(self) -> int:
        """Lines that are not written yet."""
        return self._waiting.qsize()

    def write(self, event: str, **facts: Any) -> None:
        """Append one line. Facts that are None are left out."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line |= {name: fact for name, fact in facts.items() if fact is not None}
        with suppress(queue.Full):
            self._waiting.put_nowait(json.dumps(line).encode() + b"\n")

    def write_bug(self, error: BaseException, **facts: Any) -> None:
        """Append the class of an unexpected exception and where it came from; its message may quote a user."""
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        self.write("bug", exception=type(error).__name__, frames=frames, **facts)

    def close(self) -> None:
        """Write what is waiting, then stop; what is written later is lost. May be called again."""
        if not self._writer.is_alive():
            return
        with suppress(queue.Full):
            self._waiting.put(None, timeout=CLOSE_S)
        self._writer.join(CLOSE_S)

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            with suppress(OSError):  # a full disk or a reader that has gone costs the line, not the service
                os.write(self._descriptor, line)
        os.close(self._descriptor)
