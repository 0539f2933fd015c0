"""HAProxy itself under the configuration that Ray writes and we change: failures are problems, nobody keeps others out.

Replicas are small HTTP servers here; tests/integration has the same with Ray.
"""

from __future__ import annotations

import hashlib
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
from subprocess import PIPE

import httpx2
import psutil
import pytest
from haproxy_files import write_configuration
from serving import eventually, free_port

from service.errors import ServerStartError
from service.launch import haproxy_config, haproxy_standby
from service.launch.haproxy import PYTHON_VARIABLE, SCRIPT, change, haproxy_binary
from service.launch.haproxy_config import changed
from service.launch.haproxy_routes import has_routes, replicas_of
from service.launch.haproxy_standby import StandbyFiles, running_standby, take_over, watch, without_admin_socket

Configure = Callable[..., Path]
"""Writes a configuration as Ray does; returns its file."""


class Replica(BaseHTTPRequestHandler):
    """Answers every GET with 200, a PUT with the SHA-256 of its body, and a PATCH with 413 before its body is there.

    It closes the connection of a POST without an answer, as a replica that dies.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_PUT(self) -> None:
        digest = hashlib.sha256(self.rfile.read(int(self.headers["Content-Length"]))).digest()
        self.send_response(200)
        self.send_header("Content-Length", str(len(digest)))
        self.end_headers()
        self.wfile.write(digest)

    def do_PATCH(self) -> None:
        self.send_response(413)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Replicas(ThreadingHTTPServer):
    """A server of `Replica`."""

    def handle_error(self, *_: object) -> None:
        """Print nothing: HAProxy is killed at the end of each test, which resets its connections."""


@pytest.fixture
def replica() -> Iterator[int]:
    """The port of a replica that runs."""
    with Replicas(("127.0.0.1", 0), Replica) as server:
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
    """While no replica listens every request gets 503 within a few seconds, although Ray's fallback proxy hangs."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        config = configure(port, free_port(), fallback=hanging.getsockname()[1])
        with running(config, port):
            for _ in range(4):
                begin = time.monotonic()
                assert_retryable(httpx2.get(f"http://127.0.0.1:{port}/readyz"), "not_ready")
                assert time.monotonic() - begin < 4.0


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
        transport = httpx2.HTTPTransport(local_address="127.0.0.2")
        with httpx2.Client(transport=transport, timeout=3.0) as probe:
            assert probe.get(f"http://127.0.0.1:{port}/readyz").status_code == 200


def test_a_slow_head_is_closed(configure: Configure, replica: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection whose headers come byte by byte gets 408 in bounded time, however steadily they come."""
    monkeypatch.setattr(haproxy_config, "HEAD_S", 1)
    port = free_port()
    with (
        running(configure(port, replica), port),
        closing(socket.create_connection(("127.0.0.1", port), timeout=0.05)) as slow,
    ):
        slow.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nX: ")
        assert received(slow, lambda: slow.sendall(b"a")).startswith(b"HTTP/1.1 408 ")


def test_a_connection_with_an_unread_body_is_not_used_again(configure: Configure, replica: int) -> None:
    """A refusal that the replica sends before the body has arrived tells the client to close the connection."""
    port = free_port()
    with (
        running(configure(port, replica), port),
        closing(socket.create_connection(("127.0.0.1", port), timeout=0.05)) as client,
    ):
        client.sendall(b"PATCH /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + bytes(20_000))
        head = received(client, lambda: None)
        client.close()
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"\r\nconnection: close\r\n" in head.lower()
        assert "connection" not in httpx2.get(f"http://127.0.0.1:{port}/readyz").headers


def test_a_body_larger_than_the_buffer_arrives(configure: Configure, replica: int) -> None:
    """A body of a megabyte reaches the replica whole, and a client that waits for 100 Continue gets it."""
    port = free_port()
    body = os.urandom(1024 * 1024)
    with running(configure(port, replica), port):
        answer = httpx2.put(f"http://127.0.0.1:{port}/v1/score", content=body)
        assert answer.content == hashlib.sha256(body).digest()
        with closing(socket.create_connection(("127.0.0.1", port), timeout=0.05)) as careful:
            careful.sendall(b"PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            assert received(careful, lambda: None).startswith(b"HTTP/1.1 100 ")
            careful.sendall(b"{}")
            assert received(careful, lambda: None).startswith(b"HTTP/1.1 200 ")


def received(connection: socket.socket, meanwhile: Callable[[], None]) -> bytes:
    """What has come within five seconds, up to the first pause, while ``meanwhile`` is called again and again."""
    content, give_up_at = b"", time.monotonic() + 5
    while not content and time.monotonic() < give_up_at:
        with suppress(TimeoutError, ConnectionError):
            content += connection.recv(65536)
        with suppress(ConnectionError):
            meanwhile()
    return content


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


@pytest.mark.parametrize("left_before", [False, True])
def test_a_haproxy_that_ray_has_left_is_ended(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, left_before: bool
) -> None:
    """Without its parent it goes on while a replica listens; without both it is ended, so that the port is free.

    The parent may have ended before the watcher looks for the first time.
    """
    monkeypatch.setattr(haproxy_standby, "CHECK_S", 0.02)
    files = StandbyFiles(tmp_path)
    starts = "sleep 300 > /dev/null & echo $!; read line"
    parent = subprocess.Popen(["/bin/sh", "-c", starts], stdin=PIPE, stdout=PIPE, text=True)
    assert parent.stdout is not None
    haproxy = psutil.Process(int(parent.stdout.readline()))  # any process that a signal ends
    with Replicas(("127.0.0.1", 0), Replica) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        files.routes.write_text(configure(free_port(), server.server_port).read_text())
        if left_before:
            parent.communicate("")
        watcher = threading.Thread(target=watch, args=(haproxy.pid, parent.pid, "none", files), daemon=True)
        watcher.start()
        if not left_before:
            parent.communicate("")
        time.sleep(0.02 * 4 * haproxy_standby.LEFT_CHECKS)
        assert haproxy.is_running()
        server.shutdown()
    watcher.join(30)

    assert not watcher.is_alive()
    assert eventually(lambda: not haproxy.is_running(), 10)


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
