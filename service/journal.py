"""One JSON line per request: counts, durations, identifiers and the error's code, never a text of a user.

Lines are written by a thread of their own, so a log that nobody reads cannot hold up an answer; what does not fit the
short queue in front of it is dropped. It does not decide what is worth a line; that is for the routes.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import traceback
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from typing import Any

MAX_WAITING_LINES = 10_000

_logger = logging.getLogger("service.journal")


class _DroppingHandler(QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            return

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record  # the message is a finished line already


class Journal:
    """An open log. ``path``: a file that is appended to; none: standard error, which Ray keeps with its own logs."""

    def __init__(self, path: str | None = None) -> None:
        self._file = None if path is None else Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - see close
        waiting: queue.Queue[logging.LogRecord] = queue.Queue(MAX_WAITING_LINES)
        self._handler = _DroppingHandler(waiting)
        self._listener = QueueListener(waiting, logging.StreamHandler(self._file or sys.stderr))
        self._listener.start()
        self._is_open = True

    def write(self, event: str, **facts: Any) -> None:
        """Append one line. Facts that are None are left out."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line |= {name: fact for name, fact in facts.items() if fact is not None}
        self._handler.handle(logging.makeLogRecord({"msg": json.dumps(line), "name": _logger.name}))

    def write_bug(self, error: BaseException, **facts: Any) -> None:
        """Append the class of an unexpected exception and where it came from; its message may quote a user."""
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        self.write("bug", exception=type(error).__name__, frames=frames, **facts)

    def close(self) -> None:
        """Write what is waiting, then stop; what is written later is lost. May be called again."""
        if not self._is_open:
            return
        self._is_open = False
        self._listener.stop()
        if self._file is not None:
            self._file.close()
