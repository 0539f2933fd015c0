"""The environment of Ray: ports, private paths, a token that only its user can read."""

import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import ServerStartError
from service.launch.ports import Ports, _default_or_free, choose_ports
from service.launch.private_folder import write_token
from service.launch.ray_environment import ray_environment


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


def test_http_port_in_use(taken: socket.socket) -> None:
    """An HTTP port in use is refused in one sentence that names it."""
    port = taken.getsockname()[1]

    with pytest.raises(
        ServerStartError, match=rf"^Cannot listen on 127\.0\.0\.1 port {port}: address already in use\.$"
    ):
        choose_ports("127.0.0.1", port)


def test_address_of_another_machine() -> None:
    """A host that is not an address of this machine is refused."""
    with pytest.raises(ServerStartError, match=r"^Cannot listen on 203\.0\.113\.1"):
        choose_ports("203.0.113.1", 0)


def test_ports_differ() -> None:
    """All ports of a server are different."""
    ports = choose_ports("127.0.0.1", 18999)
    numbers = [getattr(ports, name) for name in Ports.__slots__]

    assert len(set(numbers)) == len(numbers)


def test_another_port_replaces_a_default_in_use(taken: socket.socket) -> None:
    """Where a default port is in use, for example by another server, a free one is chosen."""
    port = taken.getsockname()[1]

    assert _default_or_free(port, set()) not in {port, 0}


def environment(folder: Path, deadline_s: float = 600) -> dict[str, str]:
    return ray_environment(folder, Ports(8000), folder / "token", cores=2, deadline_s=deadline_s, drain_s=1)


def test_private_paths_are_in_the_private_folder(tmp_path: Path) -> None:
    """Sockets, state and token have paths in the private folder."""
    suffixes = ("_PATH", "_LOC", "_BASE", "_FILE")
    variables = environment(tmp_path).items()
    paths = {name: value for name, value in variables if name.endswith(suffixes) and not name.endswith("IMPORT_PATH")}

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
