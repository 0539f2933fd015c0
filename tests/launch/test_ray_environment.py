"""What Ray is told: ports, private paths, and nothing for others to read."""

import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import ServerStartError
from service.launch.ray_environment import Ports, _usual_or_free, choose_ports, ray_environment


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def test_port_in_use(taken: socket.socket) -> None:
    """A taken HTTP port is refused in one sentence that names it."""
    port = taken.getsockname()[1]

    with pytest.raises(
        ServerStartError, match=rf"^Cannot listen on 127\.0\.0\.1 port {port}: address already in use\.$"
    ):
        choose_ports("127.0.0.1", port)


def test_address_of_another_machine() -> None:
    """A host that is not this machine's is refused as such."""
    with pytest.raises(ServerStartError, match=r"^Cannot listen on 203\.0\.113\.1"):
        choose_ports("203.0.113.1", 0)


def test_ports_differ() -> None:
    """All ports of a server are different."""
    ports = choose_ports("127.0.0.1", 18999)
    numbers = [getattr(ports, name) for name in Ports.__slots__]

    assert len(set(numbers)) == len(numbers)


def test_taken_usual_port_gives_way(taken: socket.socket) -> None:
    """Where a usual number is taken, another server runs already, and a free one is found."""
    port = taken.getsockname()[1]

    assert _usual_or_free(port, set()) not in {port, 0}


def test_everything_private_lies_in_the_folder(tmp_path: Path) -> None:
    """Sockets, state and token have paths in the private folder, and only their owner reads the token."""
    environment = ray_environment(tmp_path, Ports(8000), deadline_s=600, drain_s=1)

    paths = {name: value for name, value in environment.items() if name.endswith(("_PATH", "_LOC", "_BASE", "_FILE"))}
    assert len(paths) == 6
    assert all(Path(value).is_relative_to(tmp_path) for value in paths.values())
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64


def test_proxy_outlasts_the_deadline(tmp_path: Path) -> None:
    """HAProxy never cuts a request that may still be answered."""
    environment = ray_environment(tmp_path, Ports(8000), deadline_s=900, drain_s=1)

    assert int(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 900
