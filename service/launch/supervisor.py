"""Start and watch the processes of a server on this machine, and leave none behind.

It imports neither Ray nor torch. Ray starts many processes, and some outlive the one that started them (HAProxy does),
so this process makes itself the subreaper of its orphaned descendants: whatever is left after the orderly shutdown, or
when that takes too long, is still a descendant and is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from service.errors import ServerStartError
from service.launch.launch import Launch
from service.launch.ports import reachable

STOP_AFTER_S = 12.0
"""Seconds that the orderly shutdown may take before all remaining processes are killed."""
SWEEP_S = 2.0
"""Seconds after which ``sweep`` gives up."""
START_TIMEOUT_S = 1800.0
"""Loading a large model from a slow disk takes long; a start that fails, fails much earlier."""
_TICK_S = 0.2
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_CHILD_SUBREAPER = 36
_CHILD = "from service.app import main; main()"


class Progress(Protocol):
    """Receives the stages of a start and a stop, to show them to the user."""

    def stage(self, name: str) -> None:
        """A stage has begun: ``ray``, ``serve``, ``model``, ``running``."""
        ...

    def ready(self) -> None:
        """The service answers."""
        ...

    def stopping(self) -> None:
        """The orderly shutdown has begun."""
        ...


class StopRequested(BaseException):
    """SIGINT or SIGTERM. A BaseException, so that no ``except Exception`` catches it."""


def raise_on_stop_signals() -> None:
    """From here on the first SIGINT or SIGTERM raises StopRequested; later ones are ignored."""

    def request(_number: int, _frame: object) -> None:
        _ignore_stop_signals()
        raise StopRequested

    for number in _STOP_SIGNALS:
        signal.signal(number, request)


def _ignore_stop_signals() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def supervise(launch: Launch, environment: dict[str, str], progress: Progress) -> None:
    """Run the server until SIGINT or SIGTERM raises StopRequested, then stop all its processes.

    Raises:
        ServerStartError: the server did not start, or exited by itself; one sentence with the reason and the log.
        StopRequested: the server was asked to stop, and all its processes have ended.
    """
    _adopt_orphans()
    log_path = Path(launch.folder) / "server.log"
    try:
        with log_path.open("wb") as log:
            server = _Server(launch, environment, log)
        try:
            server.await_ready(progress)
            server.watch()
        except StopRequested:
            progress.stopping()
            server.stop()
            raise
    except ServerStartError as error:
        message = f"{error} The log is {log_path}."
        raise ServerStartError(message) from None
    finally:
        _ignore_stop_signals()
        sweep()


class _Server:
    """The process that runs Ray, the pipe whose end stops it, and the pipe on which it reports stages."""

    def __init__(self, launch: Launch, environment: dict[str, str], log: IO[bytes]) -> None:
        self._url = f"http://{reachable(launch.host)}:{launch.port}/readyz"
        self._started_at = time.monotonic()
        reports, reports_child = os.pipe()
        self._reports = os.fdopen(reports, "rb", buffering=0)
        self._unread = b""
        self._is_running = False
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and a module of this package
            [sys.executable, "-P", "-c", _CHILD, str(reports_child)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            pass_fds=[reports_child],
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )
        os.close(reports_child)
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._stdin = self._process.stdin
        with suppress(BrokenPipeError):  # the process has exited already: await_ready reports it
            self._stdin.write(json.dumps(asdict(launch)).encode() + b"\n")
            self._stdin.flush()

    def await_ready(self, progress: Progress) -> None:
        """Return once ``/readyz`` answers 200 through the proxy."""
        while not (self._is_running and _answers_ready(self._url)):
            if time.monotonic() - self._started_at > START_TIMEOUT_S:
                raise ServerStartError(f"The server was not ready after {START_TIMEOUT_S:.0f} s.")
            for report in self._read_reports():
                if "failed" in report:
                    raise ServerStartError(_sentence(report["failed"]))
                self._is_running = report["stage"] == "running"
                progress.stage(report["stage"])
            self._check_alive()
        progress.ready()

    def watch(self) -> None:
        """Never return; raise when the server exits by itself."""
        while True:
            self._check_alive()
            _reap_orphans(own_child=self._process.pid)
            time.sleep(_TICK_S)

    def stop(self) -> None:
        """Request the orderly shutdown, if the server has started, and wait for it for ``STOP_AFTER_S`` at most."""
        if not self._is_running:
            return
        self._stdin.close()
        try:
            self._process.wait(STOP_AFTER_S)
        except subprocess.TimeoutExpired:
            return

    def _check_alive(self) -> None:
        status = self._process.poll()
        if status is not None:
            raise ServerStartError(f"The server process exited by itself with status {status}.")

    def _read_reports(self) -> Iterator[dict[str, Any]]:
        readable, _, _ = select.select([self._reports], [], [], _TICK_S)
        if readable:
            self._unread += self._reports.read(65536) or b""
        *lines, self._unread = self._unread.split(b"\n")
        yield from (json.loads(line) for line in lines)


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans(own_child: int) -> None:
    """Collect the exit status of orphans that have ended; that of the own child is left to its Popen."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == own_child:
            return
        os.waitpid(ended.si_pid, 0)


def sweep() -> None:
    """Kill all descendants of this process, also those that appear meanwhile, and collect their exit status."""
    give_up_at = time.monotonic() + SWEEP_S
    while (descendants := psutil.Process().children(recursive=True)) and time.monotonic() < give_up_at:
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _answers_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310 - an http URL made here
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _sentence(text: str) -> str:
    stripped = text.strip()
    return stripped if stripped.endswith((".", "!", "?")) else f"{stripped}."
