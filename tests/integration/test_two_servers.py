"""Two servers on one machine: an answer always comes from the server that was asked, whatever dies."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx2
import psutil
import pytest
from serving import RunningServer, await_ready, eventually, listening_ports, serving, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

REPLICA, PROXY, CONTROLLER = "ray::ServeReplica", "ray::ProxyActor", "ray::ServeController"
CHAOS_S = 45.0


def oracle(name: str) -> tuple[str, ...]:
    """Options of an oracle whose answers carry the name."""
    return ("--engine", "oracle", "--name", name, "--num-threads", "1")


def processes(server: RunningServer, kind: str) -> list[psutil.Process]:
    """The descendants of a server whose title begins with the kind."""
    found = []
    for process in server.descendants():
        with suppress(psutil.NoSuchProcess):
            if Path(process.cmdline()[0]).name.startswith(kind) or process.cmdline()[0].startswith(kind):
                found.append(process)
    return found


def served_name(url: str) -> str:
    """The name of the model that answers at a URL; ``none`` where there is no answer, or an error."""
    body = {"items": [{"prompt": "a", "completion": "b"}]}
    try:
        answer = httpx2.post(f"{url}/v1/score", json=body, timeout=10, trust_env=False)
    except httpx2.HTTPError:
        return "none"
    return str(answer.json()["model"]["name"]) if answer.status_code == 200 else "none"


def answers_as(url: str, name: str) -> bool:
    """Whether the model of that name answers at a URL."""
    return served_name(url) == name


def replica_ports(server: RunningServer) -> set[int]:
    """The numbers that replicas of a server may listen on."""
    variables = server.ray_driver().environ()
    first, end = (int(variables[f"RAY_SERVE_DIRECT_INGRESS_{side}_HTTP_PORT"]) for side in ("MIN", "MAX"))
    return set(range(first, end))


@contextmanager
def suspended(process: psutil.Process) -> Iterator[None]:
    """Stop a process, and let it go on at the end."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def test_a_dead_replica_has_no_heir_in_another_server(tmp_path: Path) -> None:
    """A server that starts while the first one's proxy still points at a dead replica gets none of its requests."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with serving(tmp_path / "first", *oracle("first")) as first:
        assert served_name(first.url) == "first"
        # Without its controller, the proxy learns neither of the replica's end nor of another one.
        ports = replica_ports(first)
        with suspended(processes(first, CONTROLLER)[0]):
            for process in (*processes(first, PROXY), *processes(first, REPLICA)):
                process.kill()
            with serving(tmp_path / "second", *oracle("second")) as second:
                answers = Counter(served_name(first.url) for _ in range(50))
                assert served_name(second.url) == "second"
                assert not ports & replica_ports(second)

    assert answers["second"] == 0, answers


def test_servers_started_together_never_answer_for_each_other(tmp_path: Path) -> None:
    """Two servers that start at the same time share no port; while parts of both are killed, none answers for both."""
    names = ("first", "second")
    for name in names:
        (tmp_path / name).mkdir()
    with (
        started(tmp_path / "first", *oracle("first"), "--replicas", "2") as first,
        started(tmp_path / "second", *oracle("second"), "--replicas", "2") as second,
    ):
        servers = dict(zip(names, (first, second), strict=True))
        for server in servers.values():
            await_ready(server)
        assert not listening_ports(first.descendants()) & listening_ports(second.descendants())

        answers = answers_under_fire(servers)

        for name, server in servers.items():
            assert eventually(partial(answers_as, server.url, name), 60.0)
    for name in names:
        assert set(answers[name]) <= {name, "none"}
        assert answers[name][name] > 20


def answers_under_fire(servers: dict[str, RunningServer]) -> dict[str, Counter[str]]:
    """Send requests to all servers while their replicas and proxies are killed; count the names that answered."""
    answers: dict[str, Counter[str]] = {name: Counter() for name in servers}
    over = threading.Event()

    def ask(name: str) -> None:
        while not over.is_set():
            answers[name][served_name(servers[name].url)] += 1

    random_ = random.Random(5)
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, name) for name in servers for _ in range(4)]
        give_up_at = time.monotonic() + CHAOS_S
        while time.monotonic() < give_up_at:
            time.sleep(3.0)
            victims = processes(random_.choice(list(servers.values())), random_.choice([REPLICA, REPLICA, PROXY]))
            if victims:
                with suppress(psutil.NoSuchProcess):
                    random_.choice(victims).kill()
        over.set()
        for future in asking:
            future.result()
    return answers
