"""The client's promises beyond the law: what it sends, what it returns, how it waits, where it can live."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError

import pytest
import stamina.instrumentation
from misbehaving_server import VERSION, Request, World, ok, problem, running, scores
from reward_client import AsyncRewardClient, ChunkLimits, RetryPolicy, RewardClient
from reward_client.errors import ClientDeadlineExceeded, ItemsFailed, RequestRejected, ServiceUnavailable

QUICK = RetryPolicy(max_attempts=4, first_wait_s=0.005, max_wait_s=0.02, jitter_s=0.005)


@pytest.fixture
def world() -> Iterator[World]:
    with running(World()) as honest:
        yield honest


@pytest.fixture
def waits() -> Iterator[list[float]]:
    """The waits between tries, in seconds, as they are begun."""
    begun: list[float] = []
    stamina.instrumentation.set_on_retry_hooks([lambda details: begun.append(details.wait_for)])
    yield begun
    stamina.instrumentation.set_on_retry_hooks(None)


class Slow(World):
    """Takes a while for each request."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        await asyncio.sleep(0.05)
        yield ok(scores(request))


class BusyOnce(World):
    """Asks the first caller to come back in a second."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.number == 0:
            yield problem("503 Service Unavailable", "overloaded", "Retry-After: 1")
        else:
            yield ok(scores(request))


class Refusing(World):
    """Refuses everything."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield problem("413 Content Too Large", "item_too_long")


class Describing(World):
    """Has diagnostics of its own, some of which no client of today knows."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        answer["results"][0] |= {"length": {"scored_tokens": 7}, "ood": {"p_value": None}}
        yield ok(answer)


class Failing(World):
    """The item that spells 2 has no reward."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        answer = scores(request)
        for result in answer["results"]:
            if result["reward"] == 2:
                del result["reward"]
                result["error"] = {"code": "engine_failed", "detail": "The forward pass failed"}
        yield ok(answer)


class Comparing(World):
    """Knows one comparison and one model."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.path == "/v1/model":
            yield ok({"name": "tiny", "forward": "packed"})
        else:
            table = [[0.5, 0.25], [0.75, 0.5]]
            yield ok({"model": {"version": VERSION}, "rewards": [0, 1], "probabilities": table, "results": []})


class ReadyLater(World):
    """Not ready for the first two probes."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        yield ok({}) if request.number > 1 else problem("503 Service Unavailable", "not_ready")


def test_plain_texts_and_trl_conversations_reach_the_wire_alike(world: World) -> None:
    """Both forms of texts are sent as the wire format wants them, and keys without a value are left out."""
    question = [{"role": "user", "content": "why?", "name": None}]
    answer = [{"role": "assistant", "content": "2"}]
    with RewardClient(world.url) as client:
        rewards = client.score(["why?", question], ["1", answer])

    assert rewards == [1.0, 2.0]
    assert world.requests[0].body["items"] == [
        {"prompt": "why?", "completion": "1"},
        {"prompt": [{"role": "user", "content": "why?"}], "completion": "2"},
    ]


def test_the_request_says_only_what_the_caller_said(world: World) -> None:
    """Options left open are the service's to decide, and the service is told how much time is left."""
    with RewardClient(world.url, deadline_s=30, headers={"X-Run-Id": "ppo-7"}) as client:
        client.score(["q"], ["1"])
        client.score_items([{"text": "q 1", "completion": "1"}], diagnostics="full", truncation="prompt_left")

    plain, full = (request.body for request in world.requests)
    assert {"items", "diagnostics", "timeout_ms"} == plain.keys()
    assert 29_000 < plain["timeout_ms"] <= 30_000
    assert (full["diagnostics"], full["truncation"]) == ("full", "prompt_left")
    assert world.requests[0].headers["x-run-id"] == "ppo-7"


def test_nothing_to_score_is_not_sent(world: World) -> None:
    """An empty call returns an empty list without a request, which the service would refuse."""
    with RewardClient(world.url) as client:
        assert client.score([], []) == []

    assert not world.requests


def test_diagnostics_are_carried_through_as_they_came() -> None:
    """Blocks that this client has never heard of reach the caller, beside reward, id and model version."""
    with running(Describing()) as world, RewardClient(world.url) as client:
        scored = client.score_items([{"prompt": "q", "completion": "1", "id": "a"}, {"prompt": "q", "completion": "2"}])

    assert scored[0].diagnostics == {"length": {"scored_tokens": 7}, "ood": {"p_value": None}}
    assert (scored[0].id, scored[0].reward, scored[0].model_version) == ("a", 1.0, VERSION)
    assert (scored[1].id, scored[1].diagnostics) == (None, {})


def test_failed_items_keep_the_rewards_of_the_others() -> None:
    """The exception names each failed item by its place in the caller's list, and holds every other reward."""
    chunks = ChunkLimits(max_items=2)
    with (
        running(Failing()) as world,
        RewardClient(world.url, chunks=chunks) as client,
        pytest.raises(ItemsFailed) as caught,
    ):
        client.score([f"q{number}" for number in range(5)], [str(number) for number in range(5)])

    assert caught.value.rewards == (0.0, 1.0, None, 3.0, 4.0)
    assert [(failure.index, failure.code) for failure in caught.value.failures] == [(2, "engine_failed")]


def test_chunks_keep_the_order_and_travel_together() -> None:
    """A large call is several requests at a time, as many as there may be connections, joined in input order."""
    chunks = ChunkLimits(max_items=5)
    with running(Slow()) as world, RewardClient(world.url, max_connections=3, chunks=chunks) as client:
        rewards = client.score([f"q{number}" for number in range(40)], [str(number) for number in range(40)])

    assert list(range(40)) == rewards
    assert len(world.requests) == 8
    assert world.most_in_flight == 3


def test_retry_after_is_honoured(waits: list[float]) -> None:
    """The wait is what the service asked for plus jitter, not our backoff, and the next try is told of less time."""
    with running(BusyOnce()) as world, RewardClient(world.url, deadline_s=20, retries=QUICK) as client:
        rewards = client.score(["q"], ["1"])

    assert rewards == [1.0]
    assert len(waits) == 1
    assert 1.0 <= waits[0] <= 1.0 + QUICK.jitter_s
    first, second = (request.body["timeout_ms"] for request in world.requests)
    assert second <= first - 1000


def test_waits_grow_up_to_their_limit(waits: list[float]) -> None:
    """Without a Retry-After the backoff doubles, with jitter, and is capped; then the tries are spent."""
    policy = RetryPolicy(max_attempts=5, first_wait_s=0.01, max_wait_s=0.03, jitter_s=0.001)
    with RewardClient("http://127.0.0.1:1", retries=policy) as client, pytest.raises(ServiceUnavailable):
        client.score(["q"], ["1"])

    assert pytest.approx(waits, abs=0.0011) == [0.01, 0.02, 0.03, 0.03]


def test_refusal_is_not_repeated_and_says_why() -> None:
    """A 4xx is sent once, and its problem reaches the caller."""
    refused = pytest.raises(RequestRejected, match="413 item_too_long: a detail")
    with running(Refusing()) as world, RewardClient(world.url, retries=QUICK) as client, refused as caught:
        client.score(["q"], ["1"])

    assert caught.value.status == 413
    assert len(world.requests) == 1


def test_silence_counts_as_broken_when_a_try_may_only_take_so_long(waits: list[float]) -> None:
    """A connection that died without a word is given up after read_timeout_s, and the next try succeeds."""

    class SilentOnce(World):
        """Never answers the first request."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            await asyncio.sleep(30 if request.number == 0 else 0)
            yield ok(scores(request))

    policy = RetryPolicy(first_wait_s=0.005, jitter_s=0.005, read_timeout_s=0.2)
    with running(SilentOnce()) as world, RewardClient(world.url, retries=policy) as client:
        assert client.score(["q"], ["1"]) == [1.0]

    assert len(waits) == 1


def test_comparison_and_model_are_read() -> None:
    """The other two routes answer through the same client, with the same checks."""
    with running(Comparing()) as world, RewardClient(world.url) as client:
        comparison = client.compare("q", ["a", [{"role": "assistant", "content": "b"}]])
        model = client.model()

    assert (comparison.rewards, comparison.probabilities) == ((0.0, 1.0), ((0.5, 0.25), (0.75, 0.5)))
    assert world.requests[0].body["completions"] == ["a", "b"]
    assert model["forward"] == "packed"


def test_waiting_until_ready_ends_with_readiness() -> None:
    """503 of the readiness probe means wait; 200 ends the wait."""
    with running(ReadyLater()) as world, RewardClient(world.url) as client:
        client.wait_until_ready(timeout_s=10)

    assert [request.path for request in world.requests] == ["/readyz"] * 3


def test_waiting_until_ready_has_an_end() -> None:
    """A service that never comes up is an exception after timeout_s, not a hang."""
    with RewardClient("http://127.0.0.1:1") as client, pytest.raises(ClientDeadlineExceeded):
        client.wait_until_ready(timeout_s=0.3)


def test_errors_hold_no_text(world: World) -> None:
    """An item that JSON cannot carry is named by its place; neither message nor chain quotes it."""
    with RewardClient(world.url) as client, pytest.raises(ValueError, match="Item 1 is not JSON data") as caught:
        client.score(["q", "secret \ud800"], ["1", "2"])

    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert not world.requests


def test_one_async_client_serves_several_loops(world: World) -> None:
    """Trainers call from a new event loop each step: every loop gets its own connections; ended ones are forgotten."""
    client = AsyncRewardClient(world.url)

    async def step() -> list[float]:
        async with client:
            return await client.score(["q"], ["1"])

    assert [asyncio.run(step()) for _ in range(3)] == [[1.0]] * 3
    assert not client._pools


def test_one_sync_client_serves_many_threads(world: World) -> None:
    """Threads share one client and each gets its own answers."""
    answers: dict[int, list[float]] = {}
    with RewardClient(world.url) as client:

        def work(number: int) -> None:
            answers[number] = client.score(["q"] * 3, [str(number), str(number + 0.5), str(-number)])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert answers == {number: [number, number + 0.5, -number] for number in range(12)}


async def test_sync_client_works_inside_a_running_loop(world: World) -> None:
    """A notebook or an asynchronous trainer may call it too."""
    with RewardClient(world.url) as client:
        assert client.score(["q"], ["1"]) == [1.0]


def test_close_ends_the_waiting_calls_of_other_threads() -> None:
    """Nobody waits for ever on a client that somebody else has closed."""

    class Silent(World):
        """Never answers."""

        async def answer(self, request: Request) -> AsyncIterator[bytes]:
            await asyncio.sleep(30)
            yield b""

    ended = threading.Event()
    with running(Silent()) as world:
        client = RewardClient(world.url)

        def call() -> None:
            with pytest.raises(CancelledError):
                client.score(["q"], ["1"])
            ended.set()

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        while not world.requests:
            time.sleep(0.01)
        client.close()

        assert ended.wait(5)


def test_used_clients_survive_pickling(world: World) -> None:
    """A client travels to worker processes as its settings, without connections, threads or locks."""
    with RewardClient(world.url, deadline_s=7) as client:
        client.score(["q"], ["1"])
        copy = pickle.loads(pickle.dumps(client))  # noqa: S301  (our own bytes)

    with copy:
        assert copy.score(["q"], ["2"]) == [2.0]
        assert copy._client.deadline_s == 7


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_used_client_survives_a_fork(world: World) -> None:
    """A forked worker opens its own connections instead of waiting for a thread that it does not have."""
    with RewardClient(world.url) as client:
        client.score(["q"], ["1"])
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(client.score(["q"], ["3"])), daemon=True)
        child.start()
        child.join(20)

        assert child.exitcode == 0
        assert queue.get() == [3.0]


def test_client_brings_no_heavy_package() -> None:
    """Importing the client loads two small libraries and the standard one, and nothing that a trainer might pin."""
    program = (
        "import sys, reward_client; "
        "names = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names); "
        "print(*sorted(name for name in names if not name.startswith('_')))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()

    assert {"reward_client", "httpx2", "stamina"} <= set(loaded)
    assert not {"torch", "ray", "numpy", "pydantic", "transformers", "msgspec", "service"} & set(loaded)
    assert set(loaded) <= {"reward_client", "httpx2", "stamina", "tenacity", "idna", "typing_extensions", "sniffio"}


def test_url_without_a_scheme_is_refused() -> None:
    """A forgotten http:// is a sentence at construction, not sixteen failed tries."""
    with pytest.raises(ValueError, match="must start with http"):
        RewardClient("localhost:8000")
