"""HAProxy itself under the configuration that Ray writes and we change: failures are problems, nobody keeps others out.

Replicas are small HTTP servers here; tests/integration has the same with Ray.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import psutil
import pytest
from haproxy_files import write_configuration
from serving import eventually, free_port

from service.errors import ServerStartError
from service.launch import haproxy_config
from service.launch.haproxy import PYTHON_VARIABLE, SCRIPT, change, haproxy_binary
from service.launch.haproxy_config import changed
from service.launch.haproxy_routes import has_routes, replicas_of
from service.launch.haproxy_standby import StandbyFiles, running_standby, take_over, without_admin_socket

Configure = Callable[..., Path]
"""Writes a configuration as Ray does; returns its file."""


class Replica(BaseHTTPRequestHandler):
    """Answers every GET with 200, and closes the connection of a POST without an answer, as a replica that dies."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def replica() -> Iterator[int]:
    """The port of a replica that runs."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Ray's own code writes the configuration."""

    def write(port: int, replica: int | None, *, fallback: int | None = None, maxconn: int = 64) -> Path:
        replicas = {} if replica is None else {"/": [replica]}
        return write_configuration(tmp_path, port, replicas, fallback=fallback, maxconn=maxconn)

    return write


@contextmanager
def running(config: Path, port: int, *command: str | Path) -> Iterator[psutil.Process]:
    """Run HAProxy, by default its binary on a changed configuration, until the block ends."""
    if not command:
        change(config)
        command = (haproxy_binary(),)
    messages = config.with_name("messages.txt")
    with messages.open("wb") as out:
        environment = {**os.environ, PYTHON_VARIABLE: sys.executable}
        process = subprocess.Popen([*command, "-db", "-f", str(config)], stdout=out, stderr=out, env=environment)
    try:
        assert eventually(lambda: process.poll() is not None or listens(port), 10)
        assert process.poll() is None, messages.read_text()
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def assert_retryable(answer: httpx2.Response, code: str) -> None:
    """The answer is a 503 with a problem document and the time of the next try."""
    assert answer.status_code == 503, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (answer.json()["code"], answer.json()["retryable"]) == (code, True)
    assert 1 <= int(answer.headers["Retry-After"]) <= 2


def test_no_404_before_routes_are_known(configure: Configure) -> None:
    """HAProxy that has just started, without routes, answers 503 and not 404, which ends training jobs."""
    port = free_port()
    with running(configure(port, None), port):
        for answer in (httpx2.get(f"http://127.0.0.1:{port}/readyz"), httpx2.post(f"http://127.0.0.1:{port}/v1/score")):
            assert_retryable(answer, "not_ready")


def test_no_replica_is_answered_at_once(configure: Configure) -> None:
    """While no replica listens every request gets 503 within two seconds, although Ray's fallback proxy hangs."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        config = configure(port, free_port(), fallback=hanging.getsockname()[1])
        with running(config, port):
            for _ in range(4):
                begin = time.monotonic()
                assert_retryable(httpx2.get(f"http://127.0.0.1:{port}/readyz"), "not_ready")
                assert time.monotonic() - begin < 2.0


def test_a_lost_replica_is_a_problem(configure: Configure, replica: int) -> None:
    """A replica that ends in the middle of a request makes a 503 that says so, not a plain 500."""
    port = free_port()
    with running(configure(port, replica), port):
        assert_retryable(httpx2.post(f"http://127.0.0.1:{port}/v1/score", content=b"{}"), "engine_unavailable")


def test_one_address_does_not_take_all_connections(configure: Configure, replica: int) -> None:
    """However many connections one address opens, a probe from another one is answered."""
    port = free_port()
    with running(configure(port, replica, maxconn=32), port), ExitStack() as stack:
        for _ in range(40):
            with suppress(ConnectionError):  # beyond its share they are closed at once
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        time.sleep(0.2)
        begin = time.monotonic()
        transport = httpx2.HTTPTransport(local_address="127.0.0.2")
        with httpx2.Client(transport=transport, timeout=3.0) as probe:
            assert probe.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        assert time.monotonic() - begin < 1.0


def test_a_slow_head_is_closed(configure: Configure, replica: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose headers come byte by byte gets 408 in bounded time, however steadily they come."""
    monkeypatch.setattr(haproxy_config, "HEAD_S", 1)
    port = free_port()
    with (
        running(configure(port, replica), port),
        closing(socket.create_connection(("127.0.0.1", port), timeout=0.05)) as slow,
    ):
        slow.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nX: ")
        answer, give_up_at = b"", time.monotonic() + 5
        while not answer and time.monotonic() < give_up_at:
            with suppress(TimeoutError, ConnectionError):
                answer += slow.recv(4096)
            with suppress(ConnectionError):
                slow.sendall(b"a")
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_only_http_is_open_to_others(configure: Configure, replica: int, tmp_path: Path) -> None:
    """HAProxy's metrics and statistics listen on loopback, its admin socket is its user's, and Ray knows its process.

    It is started as Ray starts it, by haproxy.sh.
    """
    port = free_port()
    with running(configure(port, replica), port, SCRIPT) as process:
        assert Path(process.exe()).name == "haproxy"
        listening = [connection.laddr for connection in process.net_connections("tcp") if connection.status == "LISTEN"]
        assert len(listening) == 3
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert stat.S_IMODE((tmp_path / "admin.sock").stat().st_mode) == 0o600


def test_another_configuration_is_refused(configure: Configure) -> None:
    """A change that finds no place is an error, never left out silently; a changed configuration stays as it is."""
    config = configure(free_port(), free_port()).read_text()
    once = changed(config, {})

    assert changed(once, {}) == once
    with pytest.raises(ServerStartError, match="this version of Ray is not known"):
        changed(config.replace("frontend http_frontend", "frontend renamed"), {})


def test_what_the_second_haproxy_gets(configure: Configure, tmp_path: Path) -> None:
    """It has the replicas of Ray's configuration and no admin socket; without routes nothing of it is kept."""
    files = StandbyFiles(tmp_path)
    empty, routed = (configure(free_port(), replica, fallback=1).read_text() for replica in (None, 4711))
    assert take_over(files, empty, is_reload=False) == (empty, [])
    assert not files.routes.exists()
    assert not has_routes(empty)
    assert take_over(files, routed, is_reload=False) == (routed, [])
    assert files.routes.read_text() == routed
    assert files.current.read_text() == str(os.getpid())
    assert replicas_of(routed) == [("127.0.0.1", 4711)], "the fallback proxy is no replica"
    assert "stats socket" in routed
    assert "stats socket" not in without_admin_socket(routed)
    files.standby.write_text(str(os.getpid()))  # a process id that was used again
    assert running_standby(files) is None
    assert take_over(files, empty, is_reload=False) == (empty, [])


@pytest.mark.slow
def test_a_killed_haproxy_is_replaced_at_once(configure: Configure, tmp_path: Path) -> None:
    """A second HAProxy answers after the first is killed, without the admin socket, until Ray starts another one.

    That one has no routes yet and answers all the same; then the second one has ended. When no replica listens any
    more, nothing is left.
    """
    port = free_port()
    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with running(configure(port, server.server_port), port, SCRIPT) as first:
            assert eventually(lambda: len(processes_of(tmp_path)) == 2, 10), "HAProxy and its watcher"
            assert answers(port)
            first.kill()
            assert eventually(lambda: answers(port), 10)
            (standby,) = haproxies_of(tmp_path)
            with socket.socket(socket.AF_UNIX) as probe, pytest.raises(ConnectionError):
                probe.connect(str(tmp_path / "admin.sock"))
            standby.kill()
            assert eventually(lambda: answers(port), 10), "the second one is watched, too"
            with running(configure(port, None), port, SCRIPT) as next_one:
                assert eventually(lambda: [each.pid for each in haproxies_of(tmp_path)] == [next_one.pid], 10)
                assert all(answers(port) for _ in range(20))
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(tmp_path / "admin.sock"))
        assert eventually(lambda: answers(port), 10), "killed by the end of the block"
        server.shutdown()
    assert eventually(lambda: not processes_of(tmp_path), 15)


def processes_of(folder: Path) -> list[psutil.Process]:
    """The running processes for the HAProxy of a folder: itself, those that watch it, and a second one."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in argument for argument in process.cmdline()):
                found.append(process)
    return found


def haproxies_of(folder: Path) -> list[psutil.Process]:
    return [process for process in processes_of(folder) if process.name() == "haproxy"]


def answers(port: int) -> bool:
    with suppress(httpx2.HTTPError):
        return httpx2.get(f"http://127.0.0.1:{port}/readyz", timeout=2.0).status_code == 200
    return False
