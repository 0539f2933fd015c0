"""The client: what it sends and returns, its delays, and its use from threads, event loops and processes."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError
from dataclasses import fields
from typing import Any

import pytest
import reward_client
from misbehaving_server import VERSION, FakeServer, Request, ok, problem, running, scores
from reward_client import AsyncRewardClient, ChunkLimits, Diagnostics, RetryPolicy, RewardClient, ScoredItem, retries
from reward_client.diagnostics import GroupBlock, LengthBlock, OodBlock, StyleBlock
from reward_client.errors import BadAnswer, ClientDeadlineExceeded, ItemsFailed, RequestRejected, ServiceUnavailable

from service.protocols.native_answers import BASIC_DIAGNOSTICS, FULL_DIAGNOSTICS
from service.records import GroupReport, LengthReport, OodReport, StyleReport

QUICK = RetryPolicy(max_attempts=4, first_wait_s=0.005, max_wait_s=0.02, jitter_s=0.005)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running(FakeServer()) as running_server:
        yield running_server


class Delays(logging.Handler):
    """Collects the delay of each record of a retry."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.seconds.append(float(str(record.args[-1])))


@pytest.fixture
def delays() -> Iterator[list[float]]:
    """The delays between attempts, in seconds, as the logger reports them."""
    handler, logger = Delays(), logging.getLogger("reward_client")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler.seconds
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


class Slow(FakeServer):
    """Answers every request after 0.05 seconds."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        await asyncio.sleep(0.05)
        yield ok(scores(request))


class BusyOnce(FakeServer):
    """Answers the first request with 503 and a Retry-After of one second."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.number == 0:
            yield problem("503 Service Unavailable", "overloaded", "Retry-After: 1")
        else:
            yield ok(scores(request))


class Refusing(FakeServer):
    """Answers 413 to everything."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("413 Content Too Large", "item_too_long")


class Describing(FakeServer):
    """Returns diagnostics, some of which the client does not define."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        answer["results"][0] |= {"length": {"scored_tokens": 7}, "ood": {"p_value": None}}
        yield ok(answer)


class Failing(FakeServer):
    """Returns an error for the item with completion 2."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        for result in answer["results"]:
            if result["reward"] == 2:
                del result["reward"]
                result["error"] = {"code": "engine_failed", "detail": "The forward pass failed"}
        yield ok(answer)


class Comparing(FakeServer):
    """Answers the routes of comparison and model with constants."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.path == "/v1/model":
            yield ok({"model": {"name": "tiny", "version": VERSION}, "engine": {"forward": "packed"}, "later": 1})
        else:
            table = [[0.5, 0.25], [0.75, 0.5]]
            yield ok({"model": {"version": VERSION}, "rewards": [0, 1], "probabilities": table, "results": []})


class ReadyLater(FakeServer):
    """Answers the first two readiness probes with 503."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok({}) if request.number > 1 else problem("503 Service Unavailable", "not_ready")


def test_plain_texts_and_trl_conversations_are_sent_in_wire_format(server: FakeServer) -> None:
    """Both forms are converted to the wire format, and keys without a value are left out."""
    question = [{"role": "user", "content": "why?", "name": None}]
    answer = [{"role": "assistant", "content": "2"}]
    with RewardClient(server.url) as client:
        rewards = client.score(["why?", question], ["1", answer])

    assert rewards == [1.0, 2.0]
    assert server.requests[0].body["items"] == [
        {"prompt": "why?", "completion": "1"},
        {"prompt": [{"role": "user", "content": "why?"}], "completion": "2"},
    ]


def test_options_that_are_not_given_are_not_sent(server: FakeServer) -> None:
    """The service then uses its own settings; the remaining time is always sent."""
    with RewardClient(server.url, deadline_s=30, headers={"X-Run-Id": "ppo-7"}) as client:
        client.score(["q"], ["1"])
        client.score_items([{"text": "q 1", "completion": "1"}], diagnostics="full", truncation="prompt_left")

    plain, full = (request.body for request in server.requests)
    assert {"items", "diagnostics", "timeout_ms"} == plain.keys()
    assert 29_000 < plain["timeout_ms"] <= 30_000
    assert (full["diagnostics"], full["truncation"]) == ("full", "prompt_left")
    assert server.requests[0].headers["x-run-id"] == "ppo-7"


def test_nothing_to_score_is_not_sent(server: FakeServer) -> None:
    """An empty call returns an empty list without a request, which the service would refuse."""
    with RewardClient(server.url) as client:
        assert client.score([], []) == []

    assert not server.requests


def test_diagnostics_are_returned_unchanged() -> None:
    """Blocks that the client does not define are returned too, with reward, id and model version."""
    with running(Describing()) as server, RewardClient(server.url) as client:
        scored = client.score_items([{"prompt": "q", "completion": "1", "id": "a"}, {"prompt": "q", "completion": "2"}])

    assert scored[0].diagnostics == {"length": {"scored_tokens": 7}, "ood": {"p_value": None}}
    assert (scored[0].id, scored[0].reward, scored[0].model_version) == ("a", 1.0, VERSION)
    assert (scored[1].id, scored[1].diagnostics) == (None, {})


def test_score_returns_diagnostics_when_asked() -> None:
    """With a level of diagnostics ``score`` returns items whose details have typed fields; without one, floats."""
    with running(Describing()) as server, RewardClient(server.url) as client:
        rewards = client.score(["q", "q"], ["1", "2"])
        scored = client.score(["q", "q"], ["1", "2"], diagnostics="full")

    assert rewards == [item.reward for item in scored] == [1.0, 2.0]
    assert [request.body["diagnostics"] for request in server.requests] == ["none", "full"]
    assert scored[0].details == Diagnostics(length=LengthBlock(scored_tokens=7), ood=OodBlock())
    assert scored[1].details == Diagnostics()


def test_pessimism_is_sent_and_never_by_itself() -> None:
    """It goes to the service as it is given, and requests without it have no such member."""
    with running(Describing()) as server, RewardClient(server.url) as client:
        client.score(["q"], ["1"], diagnostics="full", pessimism=2)
        client.score(["q"], ["1"], diagnostics="full")

    assert [request.body.get("pessimism") for request in server.requests] == [2.0, None]
    assert "pessimism" not in server.requests[1].body
    assert ScoredItem(1.0, "v", None, {"reward_lower": 0.5}).details.reward_lower == 0.5


@pytest.mark.parametrize("value", [True, "7", 7.5, [7]])
def test_details_of_another_type_are_a_bad_answer(value: object) -> None:
    """A member with another type than the protocol's raises and is never converted."""
    item = ScoredItem(1.0, "v", None, {"length": {"scored_tokens": value}})

    with pytest.raises(BadAnswer, match="scored_tokens of length of the diagnostics"):
        _ = item.details


@pytest.mark.parametrize(
    ("block", "report"),
    [(LengthBlock, LengthReport), (StyleBlock, StyleReport), (OodBlock, OodReport), (GroupBlock, GroupReport)],
)
def test_details_have_the_fields_of_the_service(block: Any, report: Any) -> None:
    """The records of the client have exactly the fields that the service sends."""
    assert {field.name for field in fields(block)} == {field.name for field in fields(report)}
    assert {field.name for field in fields(Diagnostics)} == {
        *BASIC_DIAGNOSTICS,
        *FULL_DIAGNOSTICS,
        "reward_lower",
        "group",
        "calibration",
    }


def test_failed_items_are_reported_with_the_other_rewards() -> None:
    """The exception has the index of each failed item in the caller's list, and the rewards of the others."""
    chunks = ChunkLimits(max_items=2)
    with (
        running(Failing()) as server,
        RewardClient(server.url, chunks=chunks) as client,
        pytest.raises(ItemsFailed) as caught,
    ):
        client.score([f"q{number}" for number in range(5)], [str(number) for number in range(5)])

    assert caught.value.rewards == (0.0, 1.0, None, 3.0, 4.0)
    assert [(failure.index, failure.code) for failure in caught.value.failures] == [(2, "engine_failed")]


def test_chunks_are_sent_concurrently_and_joined_in_order() -> None:
    """A large call is split into requests, of which as many run at a time as connections are allowed."""
    chunks = ChunkLimits(max_items=5)
    with running(Slow()) as server, RewardClient(server.url, max_connections=3, chunks=chunks) as client:
        rewards = client.score([f"q{number}" for number in range(40)], [str(number) for number in range(40)])

    assert list(range(40)) == rewards
    assert len(server.requests) == 8
    assert server.max_in_flight == 3


def test_retry_after_determines_the_delay(delays: list[float]) -> None:
    """The delay is the Retry-After plus jitter, not the backoff, and the next attempt sends the remaining time."""
    with running(BusyOnce()) as server, RewardClient(server.url, deadline_s=20, retries=QUICK) as client:
        rewards = client.score(["q"], ["1"])

    assert rewards == [1.0]
    assert len(delays) == 1
    assert 1.0 <= delays[0] <= 1.0 + QUICK.jitter_s
    first, second = (request.body["timeout_ms"] for request in server.requests)
    assert second <= first - 1000


def test_delays_double_up_to_their_limit(delays: list[float]) -> None:
    """Without a Retry-After the backoff doubles, with jitter, and is capped, until the last attempt fails."""
    policy = RetryPolicy(max_attempts=5, first_wait_s=0.01, max_wait_s=0.03, jitter_s=0.001)
    with RewardClient("http://127.0.0.1:1", retries=policy) as client, pytest.raises(ServiceUnavailable):
        client.score(["q"], ["1"])

    assert pytest.approx(delays, abs=0.0011) == [0.01, 0.02, 0.03, 0.03]


def test_a_refusal_is_not_retried() -> None:
    """After a 4xx nothing is sent again, and the exception has the problem."""
    refused = pytest.raises(RequestRejected, match="413 item_too_long: a detail")
    with running(Refusing()) as server, RewardClient(server.url, retries=QUICK) as client, refused as caught:
        client.score(["q"], ["1"])

    assert caught.value.status == 413
    assert len(server.requests) == 1


class SilentOnce(FakeServer):
    """Never answers the first request, as a frozen replica."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        await asyncio.sleep(30 if request.number == 0 else 0)
        yield ok(scores(request))


def test_a_silent_connection_fails_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default an attempt gets half of the time that is left, so that another one is made before the deadline."""
    monkeypatch.setattr(retries, "MIN_ATTEMPT_S", 0.1)
    with running(SilentOnce()) as server, RewardClient(server.url, deadline_s=4.0) as client:
        begin = time.monotonic()
        assert client.score(["q"], ["1"]) == [1.0]

    assert 2.0 <= time.monotonic() - begin < 4.0


def test_a_silent_connection_fails_after_the_read_timeout(delays: list[float]) -> None:
    """A connection without a response is given up after read_timeout_s, and the next attempt succeeds."""
    policy = RetryPolicy(first_wait_s=0.005, jitter_s=0.005, read_timeout_s=0.2)
    with running(SilentOnce()) as server, RewardClient(server.url, retries=policy) as client:
        assert client.score(["q"], ["1"]) == [1.0]

    assert len(delays) == 1


def test_comparison_and_model_are_read() -> None:
    """The other two routes are called and validated in the same way."""
    with running(Comparing()) as server, RewardClient(server.url) as client:
        comparison = client.compare("q", ["a", [{"role": "assistant", "content": "b"}]])
        model = client.model()

    assert (comparison.rewards, comparison.probabilities) == ((0.0, 1.0), ((0.5, 0.25), (0.75, 0.5)))
    assert server.requests[0].body["completions"] == ["a", "b"]
    assert (model.name, model.version, model.engine.forward) == ("tiny", VERSION, "packed")
    assert model.template is None
    assert model.description["later"] == 1


def test_waiting_until_ready_ends_with_readiness() -> None:
    """It delays while the readiness probe answers 503, and returns after a 200."""
    with running(ReadyLater()) as server, RewardClient(server.url) as client:
        client.wait_until_ready(timeout_s=10)

    assert [request.path for request in server.requests] == ["/readyz"] * 3


def test_waiting_until_ready_has_a_timeout() -> None:
    """If the service does not become ready within timeout_s, an exception is raised."""
    with RewardClient("http://127.0.0.1:1") as client, pytest.raises(ClientDeadlineExceeded):
        client.wait_until_ready(timeout_s=0.3)


def test_errors_contain_no_text(server: FakeServer) -> None:
    """The error of an item that is not JSON data has its index; neither message nor cause contains the text."""
    with RewardClient(server.url) as client, pytest.raises(ValueError, match="Item 1 is not JSON data") as caught:
        client.score(["q", "secret \ud800"], ["1", "2"])

    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert not server.requests


def test_one_async_client_serves_several_loops(server: FakeServer) -> None:
    """Every event loop gets its own connections, which are dropped when the loop has ended."""
    client = AsyncRewardClient(server.url)

    async def step() -> list[float]:
        async with client:
            return await client.score(["q"], ["1"])

    assert [asyncio.run(step()) for _ in range(3)] == [[1.0]] * 3
    assert not client._pools


def test_one_sync_client_serves_many_threads(server: FakeServer) -> None:
    """Threads that share a client get their own rewards."""
    answers: dict[int, list[float]] = {}
    with RewardClient(server.url) as client:

        def work(number: int) -> None:
            answers[number] = client.score(["q"] * 3, [str(number), str(number + 0.5), str(-number)])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert answers == {number: [number, number + 0.5, -number] for number in range(12)}


async def test_sync_client_works_inside_a_running_loop(server: FakeServer) -> None:
    """It can be called from a notebook or an asynchronous trainer."""
    with RewardClient(server.url) as client:
        assert client.score(["q"], ["1"]) == [1.0]


def test_close_ends_the_waiting_calls_of_other_threads() -> None:
    """Closing a client cancels the calls of other threads."""

    class NeverAnswers(FakeServer):
        """Reads the request and sends nothing."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            await asyncio.sleep(30)
            yield b""

    ended = threading.Event()
    with running(NeverAnswers()) as server:
        client = RewardClient(server.url)

        def call() -> None:
            with pytest.raises(CancelledError):
                client.score(["q"], ["1"])
            ended.set()

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        while not server.requests:
            time.sleep(0.01)
        client.close()

        assert ended.wait(5)


def test_used_clients_survive_pickling(server: FakeServer) -> None:
    """Pickling preserves the settings, without connections, threads and locks."""
    with RewardClient(server.url, deadline_s=7) as client:
        client.score(["q"], ["1"])
        copy = pickle.loads(pickle.dumps(client))  # noqa: S301  (our own bytes)

    with copy:
        assert copy.score(["q"], ["2"]) == [2.0]
        assert copy._client.deadline_s == 7


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_used_client_survives_a_fork(server: FakeServer) -> None:
    """A forked process starts its own thread and connections."""
    with RewardClient(server.url) as client:
        client.score(["q"], ["1"])
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(client.score(["q"], ["3"])), daemon=True)
        child.start()
        child.join(20)

        assert child.exitcode == 0
        assert queue.get() == [3.0]


def test_client_imports_no_heavy_package() -> None:
    """Importing the client loads the standard library and two small ones, and no package that a trainer may pin."""
    program = (
        "import sys; from reward_client import AsyncRewardClient, RewardClient; "
        "names = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names); "
        "print(*sorted(name for name in names if not name.startswith('_')))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert {"reward_client", "httpx2", "tenacity"} <= set(loaded)
    assert not {"torch", "ray", "numpy", "pydantic", "transformers", "msgspec", "service"} & set(loaded)
    # httpx2 takes backports.zstd where it is installed, as the server's environment has it.
    assert set(loaded) <= {"reward_client", "httpx2", "tenacity", "idna", "typing_extensions", "sniffio", "backports"}


def test_the_package_and_its_errors_need_neither_httpx2_nor_asyncio() -> None:
    """The commands of the service share the exceptions; the names of the package are imported at their first use."""
    program = "import sys, reward_client.errors; print(dir(reward_client), sorted(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert all(f"'{name}'" in printed for name in reward_client.__all__)
    assert not any(f"'{name}'" in printed for name in ("httpx2", "tenacity", "asyncio", "reward_client.synchronous"))


def test_every_public_name_is_the_one_of_its_module() -> None:
    """What is listed can be imported, by the name that its class has; another name is an AttributeError."""
    assert {getattr(reward_client, name).__name__ for name in reward_client.__all__} == set(reward_client.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Rewards'"):
        getattr(reward_client, "Rewards")  # noqa: B009 - a type checker refuses the attribute


def test_url_without_a_scheme_is_refused() -> None:
    """A URL without http:// raises at construction, not after all attempts have failed."""
    with pytest.raises(ValueError, match="must start with http"):
        RewardClient("localhost:8000")
