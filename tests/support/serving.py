"""Real servers for tests: start ``reward-serve``, wait until it is ready, stop it, and find what it leaves behind."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest

COMMAND = (sys.executable, "-m", "service.launch.command")
RUNTIMES = (pytest.param("ray", marks=pytest.mark.slow), "local")
"""What a test of a server runs on; without Ray a server starts fast enough for the fast tests."""
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class RunningServer:
    """A started ``reward-serve``. ``output`` is what it wrote to standard output, ``messages`` to standard error."""

    url: str
    process: subprocess.Popen[bytes]
    output: Path
    messages: Path
    runtime: str = "ray"

    def descendants(self) -> list[psutil.Process]:
        """All processes below the start command; it adopts orphans, so there are none elsewhere."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def folder(self) -> Path:
        """The private folder of Ray's sockets and logs."""
        return Path(self.ray_driver().environ()["RAY_SERVE_HAPROXY_SERVER_STATE_BASE"])

    def written_files(self) -> list[Path]:
        """All files to which the server has written, Ray's logs among them."""
        of_ray = self.folder().rglob("*") if self.runtime == "ray" else ()
        return [self.output, self.messages, *(path for path in of_ray if path.is_file())]

    def ray_driver(self) -> psutil.Process:
        """The child of the start command, which is Ray's driver."""
        return psutil.Process(self.process.pid).children()[0]


def free_port() -> int:
    """A TCP port of the loopback interface that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(
    folder: Path, *options: str, runtime: str = "ray", command: Sequence[str] = COMMAND
) -> Iterator[RunningServer]:
    """Run ``reward-serve`` with the options on a free port, its output in the folder; it may not be ready yet.

    Its access log goes to standard output unless the options say otherwise.
    """
    port = free_port()
    log = () if "--log" in options else ("--log", "-")
    output, messages = folder / "stdout.txt", folder / "stderr.txt"
    with output.open("wb") as out, messages.open("wb") as err:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--runtime", runtime, *log, *options], stdout=out, stderr=err
        )
    try:
        yield RunningServer(f"http://127.0.0.1:{port}", process, output, messages, runtime)
    finally:
        stop(process)


@contextmanager
def serving(
    folder: Path,
    *options: str,
    runtime: str = "ray",
    command: Sequence[str] = COMMAND,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[RunningServer]:
    """Run ``reward-serve`` as `started` does, and wait until it is ready."""
    with started(folder, *options, runtime=runtime, command=command) as server:
        await_ready(server, timeout_s)
        yield server


def await_ready(server: RunningServer, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once the command reports that it is ready; fail with its messages when it exits or takes too long."""

    def is_ready() -> bool:
        assert server.process.poll() is None, server.messages.read_text()
        return "Ready in" in server.messages.read_text()

    assert eventually(is_ready, timeout_s), server.messages.read_text()


def answers_ready(url: str) -> bool:
    """Whether ``/readyz`` answers 200."""
    try:
        return httpx2.get(f"{url}/readyz", timeout=2.0, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def eventually(holds: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition becomes true in time."""
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at:
        if holds():
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
    return {port for port, process_id in _listeners() if process_id in ids}


def open_ports(ports: set[int]) -> set[int]:
    """Those of the ports on which a process listens."""
    return ports & {port for port, _ in _listeners()}


def _listeners() -> Iterator[tuple[int, int | None]]:
    """Yield the port and the process id of each listening TCP socket."""
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr:
            yield connection.laddr.port, connection.pid


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that still run; a reused process id does not count."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
