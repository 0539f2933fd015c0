"""Faults of a running service: what callers get while a part of it is dead, frozen or kept busy by slow callers."""

from __future__ import annotations

import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Self
from urllib.parse import urlsplit

import httpx2
import psutil
import pytest
from reward_client import RewardClient
from serving import RunningServer, answers_ready, eventually

from service.engines.oracle import oracle_reward_of_text

pytestmark = pytest.mark.slow

BACK_WITHIN_S = 90.0
"""Seconds until a replaced part answers, on a busy machine."""
BODY = {"items": [{"prompt": "a", "completion": "b"}]}


@pytest.fixture
def server(ray_server: RunningServer) -> Iterator[RunningServer]:
    """The shared server of Ray, ready before and after each test."""
    assert eventually(lambda: answers_ready(ray_server.url), BACK_WITHIN_S)
    yield ray_server
    assert eventually(lambda: answers_ready(ray_server.url), BACK_WITHIN_S)


def process_of(server: RunningServer, name: str) -> psutil.Process:
    """The process of a part: ``haproxy``, or the replica."""
    for process in server.descendants():
        command = process.cmdline()[:1]
        if command and command[0].rsplit("/", 1)[-1].startswith(name):
            return process
    raise AssertionError(f"no process {name}")


@contextmanager
def scored(server: RunningServer) -> Iterator[None]:
    """Score an item through our client while the block runs and after it; the reward has to come, and be right."""

    def score(number: int) -> None:
        with RewardClient(server.url, deadline_s=120) as client:
            assert client.score(["question "], [str(number)]) == [oracle_reward_of_text("question ", str(number))]

    with ThreadPoolExecutor(4) as pool:
        calls: list[Future[None]] = [pool.submit(score, number) for number in range(4)]
        yield
        for call in calls:
            call.result()


class Answers:
    """What a caller without retries gets from two routes, one request after the other, until ``stop``."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.refused: list[httpx2.Response] = []
        self.errors: list[str] = []
        self.slowest_s = 0.0
        self._url = url
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            for method, route, body in (("GET", "/readyz", None), ("POST", "/v1/score", BODY)):
                self._send(method, route, body)
            time.sleep(0.05)

    def _send(self, method: str, route: str, body: object) -> None:
        begin = time.monotonic()
        try:
            answer = httpx2.request(method, self._url + route, json=body, timeout=self._timeout_s, trust_env=False)
        except httpx2.HTTPError as error:
            self.errors.append(type(error).__name__)
        else:
            self.refused += [] if answer.status_code == 200 else [answer]
        self.slowest_s = max(self.slowest_s, time.monotonic() - begin)


def assert_retryable(answers: list[httpx2.Response]) -> None:
    """Each answer is a 503 with a problem document and the time of the next try, and none a 404 or a plain 500."""
    for answer in answers:
        assert answer.status_code == 503, answer.text
        assert answer.json()["retryable"]
        assert int(answer.headers["Retry-After"]) >= 1


def test_slow_bodies_keep_nobody_out(server: RunningServer) -> None:
    """While 600 bodies arrive byte by byte, more than Ray had places for, probes and requests are answered at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    address = urlsplit(server.url)
    with ExitStack() as stack:
        for _ in range(600):
            slow = stack.enter_context(socket.create_connection((str(address.hostname), int(address.port or 0))))
            slow.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
        time.sleep(1.0)
        with Answers(server.url, timeout_s=5.0) as answers:
            time.sleep(2.0)

    assert (answers.refused, answers.errors) == ([], [])
    assert answers.slowest_s < 2.0


def test_a_killed_replica(server: RunningServer) -> None:
    """While the only replica is replaced every request gets a 503 in two seconds, and our client gets its rewards."""
    replica = process_of(server, "ray::ServeReplica")
    with Answers(server.url, timeout_s=10.0) as answers, scored(server):
        replica.kill()
        assert eventually(lambda: not replica.is_running() and answers_ready(server.url), BACK_WITHIN_S)

    assert answers.refused
    assert_retryable(answers.refused)
    assert answers.errors == []
    assert answers.slowest_s < 3.0


def test_a_frozen_replica(server: RunningServer) -> None:
    """A stopped process is replaced in a minute; what it had accepted is answered to our client, and nothing hangs."""
    replica = process_of(server, "ray::ServeReplica")
    begin = time.monotonic()
    replica.send_signal(signal.SIGSTOP)
    with scored(server):
        assert eventually(lambda: not replica.is_running() or replica.status() == psutil.STATUS_ZOMBIE, 60.0)
        with Answers(server.url, timeout_s=10.0) as answers:
            assert eventually(lambda: answers_ready(server.url), BACK_WITHIN_S)

    print(f"replaced after {time.monotonic() - begin:.0f} s")
    assert_retryable(answers.refused)
    assert answers.errors == []


def test_a_killed_proxy(server: RunningServer) -> None:
    """After HAProxy's death a second one answers within seconds; nobody gets a 404 or a plain 500."""
    proxy = process_of(server, "haproxy")
    begin = time.monotonic()
    with Answers(server.url, timeout_s=10.0) as answers, scored(server):
        proxy.kill()
        time.sleep(0.5)
        assert eventually(lambda: answers_ready(server.url), 30.0)
        print(f"back after {time.monotonic() - begin:.1f} s")

    assert_retryable(answers.refused)
    assert set(answers.errors) <= {"ConnectError", "RemoteProtocolError", "ReadError"}
