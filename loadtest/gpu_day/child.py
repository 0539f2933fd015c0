"""Runs a section's process until its end or its time limit; then nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

GRACE_S = 15.0
"""Seconds between SIGINT, after which a section ends its servers and writes what it has, and SIGKILL."""


@dataclass(frozen=True, slots=True)
class ChildEnd:
    """How a process ended."""

    status: int
    """Its exit status; negative: the signal that ended it."""

    seconds: float

    timed_out: bool
    """Whether it was stopped at its time limit."""


def run_child(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> ChildEnd:
    """Run a command, with its output in a file, for at most ``limit_s`` seconds and ``GRACE_S`` more to end."""
    started = time.monotonic()
    with log.open("wb") as output, _taken_interrupts():
        process = subprocess.Popen(  # noqa: S603  (the commands of the plan)
            command,
            env=dict(environment),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    timed_out = False
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        _end(process)
    return ChildEnd(process.returncode, time.monotonic() - started, timed_out)


@contextmanager
def _taken_interrupts() -> Iterator[None]:
    """Let a process that is started here be ended by SIGINT.

    A shell ignores SIGINT for its background jobs, their children inherit that, and Python then does not raise
    KeyboardInterrupt. A handler is not inherited.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and its descendants, some of which may have sessions of their own."""
    if process.poll() is not None:
        return
    descendants = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for descendant in descendants:
        if descendant.is_running():
            descendant.kill()
    psutil.wait_procs(descendants, GRACE_S)
