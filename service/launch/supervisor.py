"""The parent of everything that a server on this machine consists of: it starts, watches, and leaves nothing behind.

It imports neither Ray nor torch. Ray's processes are many, some give birth to others and outlive them (HAProxy does),
so this process makes itself the heir of every orphan below it: what is left when the orderly end is over, or has taken
too long, is found among its descendants and killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from service.errors import ServerStartError
from service.launch.ray_environment import Launch

STOP_AFTER_S = 12.0
"""Seconds that the orderly end may take before everything that is left is killed."""
SWEEP_S = 2.0
START_TIMEOUT_S = 1800.0
"""A large model from a slow disk takes its time; what fails, fails long before."""
_TICK_S = 0.2
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_CHILD_SUBREAPER = 36
_CHILD = "from service.app import main; main()"


class Progress(Protocol):
    """How a starting server is shown to whoever waits for it."""

    def stage(self, name: str) -> None:
        """Say that a stage has begun: ``ray``, ``serve``, ``model``, ``running``."""
        ...

    def ready(self) -> None:
        """Say that the service answers."""
        ...

    def stopping(self) -> None:
        """Say that the orderly end has begun."""
        ...


class StopRequested(BaseException):
    """SIGINT or SIGTERM; no Exception, so that nothing on the way takes it for an error of its own."""


def raise_on_stop_signals() -> None:
    """From here on the first SIGINT or SIGTERM raises StopRequested; later ones change nothing."""

    def request(_number: int, _frame: object) -> None:
        _ignore_stop_signals()
        raise StopRequested

    for number in _STOP_SIGNALS:
        signal.signal(number, request)


def _ignore_stop_signals() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for sockets, logs and the token, open to this user alone; stays behind only after a failure."""
    # Ray puts Unix sockets deep inside, and their paths may have 107 bytes: the folder must lie near the root.
    # mkdtemp makes it new and 0700.
    folder = Path(tempfile.mkdtemp(prefix="reward-", dir="/tmp"))
    try:
        yield folder
    except ServerStartError:
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def supervise(launch: Launch, environment: dict[str, str], progress: Progress) -> None:
    """Run the server until SIGINT or SIGTERM, which StopRequested announces, then end all of it.

    Raises:
        ServerStartError: the server did not come up, or ended by itself; one sentence with the reason and the log.
        StopRequested: the server was asked to end, and has ended; nothing of it is left.
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
    """The process that runs Ray, the pipe that holds it alive, and the pipe on which it reports."""

    def __init__(self, launch: Launch, environment: dict[str, str], log: IO[bytes]) -> None:
        self._url = f"http://{reachable(launch.host)}:{launch.port}/readyz"
        self._started_at = time.monotonic()
        reports, reports_child = os.pipe()
        self._reports = os.fdopen(reports, "rb", buffering=0)
        self._unread = b""
        self._is_running = False
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and our own module
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
        with suppress(BrokenPipeError):  # it has ended already: await_ready will say so
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
        """Return never; raise when the server ends by itself."""
        while True:
            self._check_alive()
            _reap_orphans(own_child=self._process.pid)
            time.sleep(_TICK_S)

    def stop(self) -> None:
        """Ask for the orderly end where there is something to end in order, and wait for it, but not for ever."""
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
            raise ServerStartError(f"The server process ended by itself with status {status}.")

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
    """Collect the exit status of orphans that have ended; that of our own child is left to its Popen."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == own_child:
            return
        os.waitpid(ended.si_pid, 0)


def sweep() -> None:
    """Kill every descendant of this process, and theirs that appear meanwhile, and collect them."""
    give_up_at = time.monotonic() + SWEEP_S
    while (descendants := psutil.Process().children(recursive=True)) and time.monotonic() < give_up_at:
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def reachable(host: str) -> str:
    """An address under which this machine reaches a server that listens on ``host``."""
    local = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}  # noqa: S104 - compared, not bound
    return local.get(host, f"[{host}]" if ":" in host else host)


def _answers_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310 - our own http URL
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _sentence(text: str) -> str:
    stripped = text.strip()
    return stripped if stripped.endswith((".", "!", "?")) else f"{stripped}."
