"""The environment of Ray: ports, private paths, a token that only its user can read."""

import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import ServerStartError
from service.launch.ports import FIRST_PORT, LAST_PORT, Ports, reserved_block, reserved_http
from service.launch.private_folder import write_token
from service.launch.ray_environment import direct_loopback, max_connections_within, ray_environment


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def test_http_port_in_use(taken: socket.socket) -> None:
    """An HTTP port in use is refused in one sentence that names it."""
    port = taken.getsockname()[1]

    with (
        pytest.raises(
            ServerStartError, match=rf"^Cannot listen on 127\.0\.0\.1 port {port}: address already in use\.$"
        ),
        reserved_http("127.0.0.1", port),
    ):
        pass


def test_address_of_another_machine() -> None:
    """A host that is not an address of this machine is refused."""
    with pytest.raises(ServerStartError, match=r"^Cannot listen on 203\.0\.113\.1"), reserved_http("203.0.113.1", 8000):
        pass


def test_http_port_among_those_of_ray() -> None:
    """HTTP cannot take a number at which another server's proxy may look for a replica."""
    with pytest.raises(ServerStartError, match=r"Choose another with --port"), reserved_http("127.0.0.1", LAST_PORT):
        pass


def test_http_port_of_a_server_that_starts() -> None:
    """Of two servers that start on one port the second is refused at once, long before a proxy listens there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with reserved_http("127.0.0.1", port):
        with pytest.raises(ServerStartError, match=r"already in use"), reserved_http("127.0.0.1", port):
            pass
        with socket.socket() as proxy:  # as HAProxy does
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            proxy.bind(("127.0.0.1", port))
            proxy.listen()
    with reserved_http("127.0.0.1", port):
        pass


def all_ports(ports: Ports) -> list[int]:
    """Ray's ports of a server."""
    fixed = ("proxy_metrics", "proxy_stats", "fallback", "autoscaler_metrics", "dashboard_metrics")
    return [*(getattr(ports, name) for name in fixed), *ports.replicas]


@pytest.mark.parametrize("replicas", [1, 3, 40])
def test_blocks_are_disjoint(replicas: int) -> None:
    """Servers that run at the same time share no port; each has several per replica, all different."""
    with reserved_block(8000, replicas) as (one, _), reserved_block(8001, replicas) as (other, _):
        assert not set(all_ports(one)) & set(all_ports(other))
    assert len(set(all_ports(one))) == len(all_ports(one))
    assert len(one.replicas) >= 4 * replicas
    assert all(FIRST_PORT < port <= LAST_PORT for port in (*all_ports(one), *all_ports(other)))


def test_block_in_which_something_listens_is_left_out() -> None:
    """A block in which a process of an earlier server still listens is not given to another server."""
    with reserved_block(8000, 1) as (before, _):
        pass
    with socket.socket() as replica:
        replica.bind(("127.0.0.1", before.replicas[7]))
        replica.listen()
        with reserved_block(8000, 1) as (after, _):
            assert not set(all_ports(before)) & set(all_ports(after))


def test_block_belongs_to_whoever_holds_its_file() -> None:
    """The block stays reserved while another process holds the descriptor, although the first one has ended."""
    with reserved_block(8000, 1) as (before, owners):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=owners)
    try:
        with reserved_block(8000, 1) as (after, _):
            assert not set(all_ports(before)) & set(all_ports(after))
    finally:
        child.communicate()


def test_more_replicas_than_ports() -> None:
    """A server for which there are not enough ports in a row is refused in one sentence."""
    with pytest.raises(ServerStartError, match=r"^This machine has no \d+ free TCP ports"), reserved_block(8000, 5000):
        pass


PORTS = Ports(8000, 21001, 21002, 21003, 21004, 21005, range(21006, 21050))


def environment(folder: Path, deadline_s: float = 600) -> dict[str, str]:
    return ray_environment(folder, PORTS, folder / "token", cores=2, deadline_s=deadline_s, drain_s=1)


def test_private_paths_are_in_the_private_folder(tmp_path: Path) -> None:
    """Sockets, state and token have paths in the private folder."""
    suffixes = ("_PATH", "_LOC", "_BASE", "_FILE")
    variables = environment(tmp_path).items()
    others = ("IMPORT_PATH", "BINARY_PATH")
    paths = {name: value for name, value in variables if name.endswith(suffixes) and not name.endswith(others)}

    assert len(paths) == 6
    assert all(Path(value).is_relative_to(tmp_path) for value in paths.values())


def test_environment_is_pure(tmp_path: Path) -> None:
    """Computing the variables writes no file."""
    environment(tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_token_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """The token of the control plane is long, random and private."""
    token = write_token(tmp_path)

    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_proxy_outlasts_the_deadline(tmp_path: Path) -> None:
    """HAProxy never cuts a connection whose request may still be answered."""
    assert int(environment(tmp_path, deadline_s=900)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 900


def test_loopback_is_added_to_what_bypasses_proxies() -> None:
    """Calls to this machine bypass proxies, of gRPC too, and what bypassed them before still does."""
    variables = direct_loopback({"no_proxy": "intern.example"})

    assert variables == dict.fromkeys(
        ("no_proxy", "NO_PROXY", "no_grpc_proxy"), "intern.example,127.0.0.1,localhost,::1"
    )
    assert direct_loopback({})["no_grpc_proxy"] == "127.0.0.1,localhost,::1"


@pytest.mark.parametrize(("open_files", "connections"), [(20_000, 7600), (1_048_576, 16_384), (4096, 1238)])
def test_haproxy_starts_under_the_limit_of_open_files(open_files: int, connections: int) -> None:
    """HAProxy needs two files and half a pipe for each connection, and does not start where they exceed the limit."""
    assert max_connections_within(open_files) == connections
    assert 2 * connections + 2 * (connections // 4) + 100 < open_files
