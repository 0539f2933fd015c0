"""The access log: one JSON line per request with counts, durations, identifiers and the error code, never user text.

A thread of its own writes the lines, so a log file that blocks cannot delay an answer; lines that do not fit into the
short queue before the thread are dropped. Which requests are logged is decided by the middleware.
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

MAX_QUEUED_LINES = 10_000
CLOSE_S = 1.0
"""Seconds that ``close`` waits for a reader that has stopped reading."""
STDERR = 2
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT


class AccessLog:
    """An open log.

    Args:
        path: a file to which lines are appended; None: the open file of the descriptor.
        descriptor: standard error, which Ray stores in its logs, or another open file.
    """

    def __init__(self, path: str | None = None, *, descriptor: int = STDERR) -> None:
        # A bare descriptor: a line is one write, so the lines of several replicas do not mix.
        self._descriptor = os.dup(descriptor) if path is None else os.open(path, APPEND, 0o644)
        self._queue: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED_LINES)
        self._writer = threading.Thread(target=self._write_all, name="access-log", daemon=True)
        self._writer.start()

    @property
    def num_queued(self) -> int:
        """Lines that are not written yet."""
        return self._queue.qsize()

    def write(self, event: str, **facts: Any) -> None:
        """Append one line. Facts that are None are left out."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        line |= {name: fact for name, fact in facts.items() if fact is not None}
        with suppress(queue.Full):
            self._queue.put_nowait(json.dumps(line).encode() + b"\n")

    def write_exception(self, error: BaseException, **facts: Any) -> None:
        """Append the class and the frames of an unexpected exception; its message may quote a user and is left out."""
        frames = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        self.write("exception", exception=type(error).__name__, frames=frames, **facts)

    def close(self) -> None:
        """Write what is queued, then stop; later lines are lost. May be called again."""
        if not self._writer.is_alive():
            return
        with suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_S)
        self._writer.join(CLOSE_S)

    def _write_all(self) -> None:
        while (line := self._queue.get()) is not None:
            with suppress(OSError):  # a full disk or a closed pipe costs the line, not the service
                os.write(self._descriptor, line)
        os.close(self._descriptor)
