"""A second HAProxy that takes the place of one that has died, until Ray has replaced it.

Ray's actor for HAProxy never starts HAProxy again (``HAProxyManager`` in ray/serve/_private/haproxy.py): three health
checks have to fail (``PROXY_HEALTH_CHECK_UNHEALTHY_THRESHOLD``, ``proxy_state.py``), then Serve's controller ends the
actor and starts another one in a new worker process, which takes ten seconds, and a minute on a busy machine. Meanwhile
every connection would be refused although the replicas run.

So each HAProxy that Ray starts gets a process that watches it. When it dies, the watcher starts HAProxy with the same
configuration, but without the admin socket, so that Ray finds it dead and replaces it as before. The HAProxy that Ray
starts then takes the port over (``-sf``), and begins with the routes that were known.

Where Ray was ended without Serve, HAProxy would stay and keep the port. The watcher ends it once its parent has ended
and no replica has listened for half a minute, within which Ray starts another one if it runs.
"""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from service.launch.haproxy_routes import Address, has_routes, replicas_of, with_earlier_routes

TICK_S = 0.2
CHECK_S = 2.0
"""Seconds between two looks at whether another HAProxy is in charge, after a change of the replicas for example."""
MAX_MISSES = 10
"""Checks in a row, a tick apart, in which no replica listens before the watcher gives up: Serve has ended."""
LEFT_CHECKS = 15
"""Checks in a row, ``CHECK_S`` apart, in which HAProxy has lost its parent and no replica listens: Ray has ended."""
CONNECT_S = 0.5
_ADMIN_SOCKET = re.compile(r"(?m)^\s+stats socket .*\n")


@dataclass(frozen=True, slots=True)
class StandbyFiles:
    """What the processes for one HAProxy leave for each other, in the folder of its configuration."""

    folder: Path

    @property
    def current(self) -> Path:
        """Process id of the HAProxy that Ray started last."""
        return self.folder / "haproxy.pid"

    @property
    def standby(self) -> Path:
        """Process id of the second HAProxy."""
        return self.folder / "standby.pid"

    @property
    def config(self) -> Path:
        """Configuration of the second HAProxy."""
        return self.folder / "standby.cfg"

    @property
    def routes(self) -> Path:
        """The last configuration of Ray that had routes."""
        return self.folder / "routes.cfg"


def without_admin_socket(config: str) -> str:
    """Return a configuration without the socket by which Ray knows that HAProxy runs."""
    return _ADMIN_SOCKET.sub("", config)


def running_standby(files: StandbyFiles) -> int | None:
    """Process id of the second HAProxy, if it runs."""
    pid = _read_pid(files.standby)
    if pid is None:
        return None
    with suppress(OSError):
        if os.fsencode(files.config) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    return None


def take_over(files: StandbyFiles, config: str, *, is_reload: bool) -> tuple[str, list[str]]:
    """Make this process, which becomes HAProxy, the current one.

    Args:
        files: of the processes for this HAProxy.
        config: the new configuration.
        is_reload: whether it takes the place of a HAProxy that runs.

    Returns:
        The configuration to use, with the routes of the HAProxy whose place it takes that Ray does not name at present
        (`with_earlier_routes`); and further arguments, which end the second HAProxy, if one runs.
    """
    replaced = running_standby(files)
    if (is_reload or replaced is not None) and files.routes.exists():
        config = with_earlier_routes(config, files.routes.read_text(encoding="utf-8"), _listens)
    if has_routes(config):
        files.routes.write_text(config, encoding="utf-8")
    files.current.write_text(str(os.getpid()), encoding="utf-8")
    return config, [] if replaced is None else ["-sf", str(replaced)]


def start_watching(files: StandbyFiles, binary: str) -> None:
    """Start the process that watches this one, which becomes HAProxy."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "service.launch.haproxy_standby",
        str(os.getpid()),
        str(os.getppid()),
        binary,
        str(files.folder),
    ]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603 - this interpreter


def watch(pid: int, parent: int, binary: str, files: StandbyFiles) -> None:
    """Wait for the end of a HAProxy, and take its place unless another one has done so; returns when not needed.

    Args:
        pid: of the HAProxy.
        parent: process that started it. It may have ended before this one runs, so it cannot be looked up here.
        binary: path of HAProxy.
        files: of the processes for this HAProxy.
    """
    with suppress(ProcessLookupError):  # it has died already
        watched = os.pidfd_open(pid)
        num_left = 0
        try:
            while not select.select([watched], [], [], CHECK_S)[0]:
                if _is_replaced(pid, files):
                    return
                num_left = num_left + 1 if _parent_of(pid) != parent and not _has_replica(files) else 0
                if num_left == LEFT_CHECKS:
                    os.kill(pid, signal.SIGUSR1)  # gives up the port, answers what is open and ends
                    return
        finally:
            os.close(watched)
    if not _is_replaced(pid, files) and files.routes.exists():
        config = files.routes.read_text(encoding="utf-8")
        files.config.write_text(without_admin_socket(config), encoding="utf-8")
        _stand_in(pid, binary, files, replicas_of(config))


def _parent_of(pid: int) -> int | None:
    with suppress(OSError):
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
        return int(after_name.split()[1])
    return None


def _has_replica(files: StandbyFiles) -> bool:
    """Whether a replica of the last known routes listens."""
    with suppress(FileNotFoundError):
        return any(map(_listens, replicas_of(files.routes.read_text(encoding="utf-8"))))
    return False


def _stand_in(pid: int, binary: str, files: StandbyFiles, replicas: Sequence[Address]) -> None:
    """Run the second HAProxy until another one of Ray is in charge, or no replica listens any more."""
    misses = 0
    standby: subprocess.Popen[bytes] | None = None
    try:
        while misses < MAX_MISSES:
            if standby is None or standby.poll() is not None:
                if _is_replaced(pid, files):
                    return
                standby = _start(binary, files)
            time.sleep(TICK_S)
            misses = 0 if any(map(_listens, replicas)) else misses + 1
    finally:
        if standby is not None and standby.poll() is None:
            standby.send_signal(signal.SIGUSR1)  # answers what is open and ends
            with suppress(subprocess.TimeoutExpired):
                standby.wait(CHECK_S)
            standby.kill()
        if not _is_replaced(pid, files):
            files.standby.unlink(missing_ok=True)


def _start(binary: str, files: StandbyFiles) -> subprocess.Popen[bytes]:
    standby = subprocess.Popen([binary, "-db", "-dR", "-f", str(files.config)], stdin=subprocess.DEVNULL)  # noqa: S603
    files.standby.write_text(str(standby.pid), encoding="utf-8")
    return standby


def _is_replaced(pid: int, files: StandbyFiles) -> bool:
    """Whether Ray has started another HAProxy since, and it runs."""
    current = _read_pid(files.current)
    if current is None or current == pid:
        return False
    with suppress(ProcessLookupError):
        os.kill(current, 0)
        return True
    return False


def _read_pid(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _listens(address: Address) -> bool:
    try:
        with socket.create_connection(address, CONNECT_S):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], StandbyFiles(Path(sys.argv[4])))
