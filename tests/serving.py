"""Real servers for tests: start ``reward-serve``, wait until it is ready, and stop it whatever happens."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

COMMAND = [sys.executable, "-m", "service.server"]
START_TIMEOUT_S = 150.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class RunningServer:
    """A server that answers. ``output`` is what it wrote to standard output, ``messages`` to standard error."""

    url: str
    process: subprocess.Popen[bytes]
    output: Path
    messages: Path


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[RunningServer]:
    """Run ``reward-serve`` with the options on a free port, its output in the folder."""
    port = free_port()
    output, messages = folder / "stdout.txt", folder / "stderr.txt"
    with output.open("wb") as out, messages.open("wb") as err:
        process = subprocess.Popen([*COMMAND, "--port", str(port), *options], stdout=out, stderr=err)
    try:
        server = RunningServer(f"http://127.0.0.1:{port}", process, output, messages)
        await_ready(server)
        yield server
    finally:
        stop(process)


def await_ready(server: RunningServer) -> None:
    """Return once ``/readyz`` answers 200; fail with the server's own words when it ends or takes too long."""
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_at:
        assert server.process.poll() is None, server.messages.read_text()
        try:
            if httpx2.get(f"{server.url}/readyz", timeout=2.0).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise AssertionError(server.messages.read_text())


def stop(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
    """Send the signal and return the exit status; kill what does not end, which fails the test."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise
