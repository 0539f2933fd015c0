"""One real server, shared by the tests of this folder that do not start their own."""

from collections.abc import Iterator

import pytest
from serving import RunningServer, serving


@pytest.fixture(scope="session")
def oracle_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """``reward-serve --engine oracle``, ready, for the whole test run."""
    with serving(tmp_path_factory.mktemp("server"), "--engine", "oracle") as server:
        yield server


@pytest.fixture(scope="session")
def server_url(oracle_server: RunningServer) -> str:
    """Base URL of the shared server."""
    return oracle_server.url
