"""Real servers for tests: start ``reward-serve``, wait until it is ready, stop it, and list what remains."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

COMMAND = (sys.executable, "-m", "service.launch.command")
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class RunningServer:
    """A started ``reward-serve``. ``output`` is what it wrote to standard output, ``messages`` to standard error."""

    url: str
    process: subprocess.Popen[bytes]
    output: Path
    messages: Path

    def descendants(self) -> list[psutil.Process]:
        """All processes below the start command, which adopts orphans, so that none is missed."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def folder(self) -> Path:
        """The private folder of sockets and logs."""
        return Path(self.runs_ray().environ()["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])

    def runs_ray(self) -> psutil.Process:
        """The child of the start command, which is Ray's driver."""
        return psutil.Process(self.process.pid).children()[0]


def free_port() -> int:
    """A TCP port of the loopback interface on which no process listens at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(folder: Path, *options: str) -> Iterator[RunningServer]:
    """Run ``reward-serve`` with the options on a free port, its output in the folder; it may not be ready yet."""
    port = free_port()
    output, messages = folder / "stdout.txt", folder / "stderr.txt"
    with output.open("wb") as out, messages.open("wb") as err:
        process = subprocess.Popen([*COMMAND, "--port", str(port), *options], stdout=out, stderr=err)
    try:
        yield RunningServer(f"http://127.0.0.1:{port}", process, output, messages)
    finally:
        stop(process)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[RunningServer]:
    """Run ``reward-serve`` as `started` does, and wait until it is ready."""
    with started(folder, *options) as server:
        await_ready(server)
        yield server


def await_ready(server: RunningServer) -> None:
    """Return once the command reports that all replicas are ready; fail with its output if it does not."""

    def is_ready() -> bool:
        assert server.process.poll() is None, server.messages.read_text()
        return "Ready in" in server.messages.read_text()

    assert eventually(is_ready, START_TIMEOUT_S), server.messages.read_text()


def answers_ready(url: str) -> bool:
    """Whether ``/readyz`` answers 200."""
    try:
        return httpx2.get(f"{url}/readyz", timeout=2.0).status_code == 200
    except httpx2.HTTPError:
        return False


def eventually(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition becomes true within the timeout."""
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        if condition():
            return True
        time.sleep(0.1)
    return False


def stop(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
    """Send the signal and return the exit status; a process that does not end is killed, which fails the test."""
    if process.poll() is None:
        process.send_signal(number)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise


def listening_ports(processes: list[psutil.Process]) -> set[int]:
    """TCP ports on which any of the processes listens."""
    ids = {process.pid for process in processes}
    return {
        connection.laddr.port
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.pid in ids
    }


def open_ports(ports: set[int]) -> set[int]:
    """The ports on which a process listens."""
    listening = {
        connection.laddr.port for connection in psutil.net_connections("tcp") if connection.status == psutil.CONN_LISTEN
    }
    return ports & listening


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that still run; a reused process id does not count."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
