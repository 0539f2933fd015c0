"""Real servers, one for each runtime, shared by the tests of this folder that do not start their own."""

from collections.abc import Iterator

import pytest
from serving import RUNTIMES, RunningServer, serving


@pytest.fixture(scope="session")
def ray_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """``reward-serve --engine oracle`` with Ray, ready, for the whole test run."""
    with serving(tmp_path_factory.mktemp("ray"), "--engine", "oracle", runtime="ray") as server:
        yield server


@pytest.fixture(scope="session")
def local_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The same on the local runtime."""
    with serving(tmp_path_factory.mktemp("local"), "--engine", "oracle", runtime="local") as server:
        yield server


@pytest.fixture(params=RUNTIMES)
def oracle_server(request: pytest.FixtureRequest) -> RunningServer:
    """The shared server of each runtime; the test runs on both."""
    server: RunningServer = request.getfixturevalue(f"{request.param}_server")
    return server


@pytest.fixture
def server_url(oracle_server: RunningServer) -> str:
    """Base URL of the shared server."""
    return oracle_server.url
