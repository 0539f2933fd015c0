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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import psutil

from service.errors import RayStartError, ServerStartError
from service.launch.launch import Launch
from service.launch.ports import reachable
from service.launch.private_folder import SERVER_LOG, save_log

STOP_AFTER_S = 12.0
"""Seconds that the orderly shutdown may take before all remaining processes are killed."""
SWEEP_S = 2.0
"""Seconds after which ``sweep`` gives up."""
START_TIMEOUT_S = 1800.0
"""Loading a large model from a slow disk takes long; a start that fails, fails much earlier."""
STOPPED_EARLY = "reward-serve: Stopped before the service was ready."
"""Printed at the end of a start that a signal has stopped."""
SIGNAL_STATUS = 128
"""A shell adds it to the number of the signal that ended a command."""
CORE_PROCESSES = frozenset({"gcs_server", "raylet"})
"""Names of Ray's processes for the cluster's state and for the node. Without the first one the routes would answer for
another minute, readiness included, and then all replicas would end at once."""
_TICK_S = 0.2
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_CHILD_SUBREAPER = 36
_CHILD = "from service.app import main; main()"


class Progress(Protocol):
    """Receives the stages of a start and a stop, to show them to the user."""

    def stage(self, name: str) -> None:
        """A stage has begun: ``ray``, ``serve``, ``model``, ``running``."""
        ...

    def ready(self, summary: str) -> None:
        """The service answers; ``summary`` says what it serves."""
        ...

    def stopping(self, *, ready: bool) -> None:
        """The shutdown has begun; ``ready``: of a server that has been ready."""
        ...


class StopRequested(BaseException):
    """SIGINT or SIGTERM. A BaseException, so that no ``except Exception`` catches it.

    ``number``: of the signal. ``after_ready``: whether the service had been ready.
    """

    def __init__(self, number: int, *, after_ready: bool = False) -> None:
        super().__init__(number)
        self.number = number
        self.after_ready = after_ready

    @property
    def status(self) -> int:
        """The exit status: 0 once the service was ready, else that of the signal, as a shell gives it."""
        return 0 if self.after_ready else SIGNAL_STATUS + self.number


def raise_on_stop_signals() -> None:
    """From here on the first SIGINT or SIGTERM raises StopRequested; later ones are ignored."""

    def request(number: int, _frame: object) -> None:
        _ignore_stop_signals()
        raise StopRequested(number)

    for number in _STOP_SIGNALS:
        signal.signal(number, request)


def _ignore_stop_signals() -> None:
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _without_stop_signals() -> Iterator[None]:
    """Let no signal interrupt the end of processes; a signal that arrives meanwhile is raised after it."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def supervise(launch: Launch, environment: dict[str, str], progress: Progress, inherited: Sequence[int] = ()) -> None:
    """Run the server until SIGINT or SIGTERM raises StopRequested, then stop all its processes.

    Args:
        launch: what the process that runs Ray gets.
        environment: variables for it, beside those of this process.
        progress: receives the stages.
        inherited: file descriptors that it holds open.

    Raises:
        RayStartError: Ray did not start the server; the next try may succeed.
        ServerStartError: the server did not start, or exited by itself.
        StopRequested: the server was asked to stop, and all its processes have ended.
    """
    _adopt_orphans()
    try:
        with (Path(launch.folder) / SERVER_LOG).open("wb") as log:
            server = _Server(launch, environment, log, inherited)
        try:
            server.await_ready(progress)
            server.watch()
        except StopRequested as request:
            request.after_ready = server.is_ready
            progress.stopping(ready=server.is_ready)
            server.stop()
            raise
    except ServerStartError as error:
        saved = save_log(Path(launch.folder), launch.port)
        raise type(error)(f"{error} The log is {saved}." if saved else str(error)) from None
    finally:
        with _without_stop_signals():
            sweep()


class _Server:
    """The process that runs Ray, the pipe whose end stops it, and the pipe on which it reports stages."""

    def __init__(self, launch: Launch, environment: dict[str, str], log: IO[bytes], inherited: Sequence[int]) -> None:
        self._url = f"http://{reachable(launch.host)}:{launch.port}/readyz"
        self._started_at = time.monotonic()
        reports, reports_child = os.pipe()
        self._reports = os.fdopen(reports, "rb", buffering=0)
        self._unread = b""
        self._stage = "ray"
        self._summary = ""
        self.is_ready = False
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter and a module of this package
            [sys.executable, "-P", "-c", _CHILD, str(reports_child)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            pass_fds=[reports_child, *inherited],
            start_new_session=True,  # Ctrl-C in a terminal is for us alone
        )
        os.close(reports_child)
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        self._stdin = self._process.stdin
        with suppress(BrokenPipeError):  # the process has exited already: await_ready reports it
            self._stdin.write(json.dumps(asdict(launch)).encode() + b"\n")
            self._stdin.flush()

    def await_ready(self, progress: Progress) -> None:
        """Return once ``/readyz`` answers 200 through HAProxy."""
        while not (self._stage == "running" and _answers_ready(self._url)):
            if time.monotonic() - self._started_at > START_TIMEOUT_S:
                raise ServerStartError(f"The server was not ready after {START_TIMEOUT_S:.0f} s.")
            self._follow_reports(progress)
            self._check_alive(progress)
        self.is_ready = True
        progress.ready(self._summary)

    def watch(self) -> None:
        """Never return; raise when the server exits by itself, or Ray loses a process that it cannot replace."""
        core = _core_processes()
        while True:
            self._check_alive()
            for process in core:
                if not _runs(process):
                    raise ServerStartError(
                        f"Ray's process {process.name} has ended, without which no replica can be replaced."
                    )
            _reap_orphans(own_child=self._process.pid)
            time.sleep(_TICK_S)

    def stop(self) -> None:
        """Request the orderly shutdown, if the server has started, and wait for it for ``STOP_AFTER_S`` at most."""
        if self._stage != "running":
            return
        self._stdin.close()
        try:
            self._process.wait(STOP_AFTER_S)
        except subprocess.TimeoutExpired:
            return

    def _follow_reports(self, progress: Progress | None) -> None:
        for report in self._read_reports():
            if "failed" in report:
                error = RayStartError if report["again"] else ServerStartError
                raise error(_sentence(report["failed"]))
            self._stage = report["stage"]
            self._summary = report.get("summary", "")
            if progress is not None:
                progress.stage(report["stage"])

    def _check_alive(self, progress: Progress | None = None) -> None:
        status = self._process.poll()
        if status is None:
            return
        self._follow_reports(progress)  # the last one may have come after it was read
        end = (
            f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited by itself with status {status}"
        )
        error = RayStartError if self._stage in {"ray", "serve"} else ServerStartError
        raise error(f"The process that runs Ray {end}.")

    def _read_reports(self) -> Iterator[dict[str, Any]]:
        readable, _, _ = select.select([self._reports], [], [], _TICK_S)
        if readable:
            self._unread += self._reports.read(65536) or b""
        *lines, self._unread = self._unread.split(b"\n")
        yield from (json.loads(line) for line in lines)


@dataclass(frozen=True, slots=True)
class _CoreProcess:
    """A process of Ray that nothing replaces."""

    name: str
    process: psutil.Process


def _core_processes() -> list[_CoreProcess]:
    """The running core processes among the descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            name = process.name()
            if name in CORE_PROCESSES:
                found.append(_CoreProcess(name, process))
    return found


def _runs(core: _CoreProcess) -> bool:
    try:
        return bool(core.process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


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


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine itself, also where the environment names a proxy for HTTP."""


def _answers_ready(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _sentence(text: str) -> str:
    stripped = text.strip()
    return stripped if stripped.endswith((".", "!", "?")) else f"{stripped}."
