"""Routes of applications that Ray forgets for a while, in HAProxy's configuration."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from haproxy_files import write_configuration
from serving import eventually, free_port

from service.errors import ServerStartError
from service.launch.haproxy import change, haproxy_binary
from service.launch.haproxy_routes import Address, replicas_of, with_earlier_routes
from service.launch.haproxy_standby import StandbyFiles, take_over


def configuration(folder: Path, port: int, replicas: Mapping[str, Sequence[int]]) -> str:
    """What Ray writes for applications by prefix, with our changes."""
    folder.mkdir(exist_ok=True)
    path = write_configuration(folder, port, replicas, fallback=1)
    change(path)
    return path.read_text(encoding="utf-8")


def all_open(_: Address) -> bool:
    return True


@contextmanager
def replica(name: str) -> Iterator[int]:
    """A server that answers every GET with its name; yields its port."""

    class Replica(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize("forgotten", ["/", "/b", "/longer"])
def test_a_forgotten_application_is_answered_by_its_replica(tmp_path: Path, forgotten: str) -> None:
    """HAProxy with the kept route sends each of three prefixes to the replica of its own application."""
    port = free_port()
    with replica("/") as root, replica("/b") as second, replica("/longer") as third:
        replicas = {"/": [root], "/b": [second], "/longer": [third]}
        previous = configuration(tmp_path / "before", port, replicas)
        others = {prefix: ports for prefix, ports in replicas.items() if prefix != forgotten}
        config = configuration(tmp_path / "now", port, others)

        kept = tmp_path / "now" / "kept.cfg"
        kept.write_text(with_earlier_routes(config, previous, all_open), encoding="utf-8")
        process = subprocess.Popen([haproxy_binary(), "-db", "-f", str(kept)])
        try:
            url = f"http://127.0.0.1:{port}"
            assert eventually(lambda: answer(f"{url}/x") is not None, 10)
            assert [answer(f"{url}{path}") for path in ("/x", "/b/x", "/longer/x", "/longer")] == [
                "/", "/b", "/longer", "/longer"
            ]  # fmt: skip
        finally:
            process.kill()
            process.wait()


def answer(url: str) -> str | None:
    try:
        return httpx2.get(url, timeout=5.0).text
    except httpx2.TransportError:
        return None


def test_the_only_application_is_kept_while_a_replica_listens(tmp_path: Path) -> None:
    """Where Ray names no application, the configuration before stays, unless all of its replicas have ended."""
    previous = configuration(tmp_path, 8000, {"/": [4711, 4712]})
    config = configuration(tmp_path, 8000, {})

    assert with_earlier_routes(config, previous, lambda address: address == ("127.0.0.1", 4712)) == previous
    assert with_earlier_routes(config, previous, lambda _: False) == config


def test_a_route_is_not_kept_without_a_replica_of_its_own(tmp_path: Path) -> None:
    """It is dropped when its replicas have ended, and when another application has the port of one."""
    previous = configuration(tmp_path, 8000, {"/a": [4711], "/b": [4712]})
    config = configuration(tmp_path, 8000, {"/b": [4712]})
    reused = configuration(tmp_path, 8000, {"/b": [4712, 4711]})

    assert replicas_of(with_earlier_routes(config, previous, all_open)) == [("127.0.0.1", 4712), ("127.0.0.1", 4711)]
    assert with_earlier_routes(config, previous, lambda address: address[1] != 4711) == config
    assert with_earlier_routes(reused, previous, all_open) == reused


def test_named_routes_are_those_of_ray(tmp_path: Path) -> None:
    """A configuration that names every application is not changed, whatever the replicas before were."""
    previous = configuration(tmp_path, 8000, {"/a": [4711], "/b": [4712]})
    config = configuration(tmp_path, 8000, {"/a": [4713], "/b": [4712], "/c": [4714]})

    assert with_earlier_routes(config, previous, all_open) == config


def test_a_route_without_a_place_is_an_error(tmp_path: Path) -> None:
    """A configuration in which a route cannot be inserted is refused, never used without the route."""
    previous = configuration(tmp_path, 8000, {"/a": [4711], "/b": [4712]})
    config = configuration(tmp_path, 8000, {"/b": [4712]}).replace("listen stats", "listen renamed")

    with pytest.raises(ServerStartError, match="this version of Ray is not known"):
        with_earlier_routes(config, previous, all_open)


def test_only_a_reload_keeps_routes(tmp_path: Path) -> None:
    """HAProxy that starts anew takes no route from a file that another one has left; a reload does."""
    files = StandbyFiles(tmp_path)
    with replica("/") as port:
        routed = configuration(tmp_path, 8000, {"/": [port]})
        empty = configuration(tmp_path, 8000, {})
        take_over(files, routed, is_reload=False)

        assert take_over(files, empty, is_reload=False) == (empty, [])
        assert take_over(files, empty, is_reload=True) == (routed, [])
    assert take_over(files, empty, is_reload=True) == (empty, [])
