"""Arguments of the client: what is wrong is told before anything is sent, without any text of the caller."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from misbehaving_server import FakeServer, running
from reward_client import AsyncRewardClient, ChunkLimits, RetryPolicy, RewardClient
from reward_client.errors import ClientError, InvalidArgument

CANARY = "canary-77d0"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with running(FakeServer()) as running_server:
        yield running_server


WRONG_CALLS: dict[str, tuple[Callable[[Any], object], str]] = {
    "two-strings": (lambda c: c.score("abc", "def"), "prompts must be a list of prompts.*not one string"),
    "prompt-is-one-string": (lambda c: c.score(CANARY, ["a"]), "not one string; for several completions of one prompt"),
    "completions-are-one-string": (lambda c: c.score(["a"], CANARY), "completions must be a list.*not one string"),
    "no-completion": (lambda c: c.score(["a"], [None]), r"completions\[0\] must be a string.*it is None"),
    "nested-prompt": (lambda c: c.score([[CANARY]], ["b"]), r"prompts\[0\]\[0\] must be a message such as"),
    "empty-conversation": (lambda c: c.score(["a", []], ["b", "c"]), r"prompts\[1\] is an empty list"),
    "one-conversation": (
        lambda c: c.score([{"role": "user", "content": CANARY}], ["b"]),
        r"prompts\[0\] must be a str",
    ),
    "lengths": (lambda c: c.score(["a", "b"], ["c"]), "2 prompts, but 1 completions"),
    "bytes": (lambda c: c.score(b"ab", b"cd"), "prompts must be a list of prompts.*of type bytes"),
    "list-of-bytes": (lambda c: c.score([b"ab"], ["cd"]), r"prompts\[0\] must be a string.*of type bytes"),
    "numbers": (lambda c: c.score(["a"], [5]), r"completions\[0\] must be a string.*of type int"),
    "nan": (lambda c: c.score(["a"], [float("nan")]), r"completions\[0\] must be a string.*of type float"),
    "dictionary": (lambda c: c.score({CANARY: 1}, ["b"]), "prompts must be a list of prompts.*of type dict"),
    "set": (lambda c: c.score({CANARY}, ["b"]), "prompts must be a list of prompts.*of type set"),
    "none": (lambda c: c.score(None, ["b"]), "prompts must be a list of prompts.*it is None"),
    "matrix": (lambda c: c.score(np.array([[CANARY]]), ["b"]), "prompts must be a list of prompts.*of type ndarray"),
    "completion-of-two": (
        lambda c: c.score(["a"], [[CANARY, CANARY]]),
        r"completions\[0\]\[0\] must be a message such",
    ),
    "completion-of-none": (lambda c: c.score(["a"], [[]]), r"completions\[0\] must be a string.*it is an empty list"),
    "completion-of-a-user": (
        lambda c: c.score(["a"], [[{"role": "user", "content": CANARY}]]),
        r"completions\[0\] must be a string.*its first message has another role",
    ),
    "diagnostics": (lambda c: c.score(["a"], ["b"], diagnostics=CANARY), "one of none, basic, full, or None"),
    "truncation": (lambda c: c.score(["a"], ["b"], truncation=CANARY), "one of error, prompt_left, or None"),
    "template": (lambda c: c.score_items([{}], template=True), "one of chat, concat, pair, or None"),
    "pessimism-without-level": (lambda c: c.score(["a"], ["b"], pessimism=1.0), 'needs diagnostics="full"'),
    "pessimism-negative": (
        lambda c: c.score(["a"], ["b"], diagnostics="full", pessimism=-1),
        "pessimism must be a finite number of standard deviations of at least 0; it is -1",
    ),
    "items-are-a-string": (lambda c: c.score_items(CANARY), "items must be a list of items.*not one string"),
    "items-are-strings": (lambda c: c.score_items([CANARY]), r"items\[0\] must be a dictionary such as"),
    "item-is-one-dictionary": (lambda c: c.score_items({"prompt": CANARY}), "items must be a list.*of type dict"),
    "item-has-number-keys": (lambda c: c.score_items([{5: CANARY}]), r"items\[0\] must be a dictionary"),
    "item-is-no-json": (lambda c: c.score_items([{"text": {CANARY}}]), "Item 0 is not JSON data"),
    "compare-a-string": (lambda c: c.compare("a", CANARY), "completions must be a list.*not one string"),
    "compare-one": (lambda c: c.compare("a", [CANARY]), "at least two completions, not 1"),
    "compare-nested-completion": (
        lambda c: c.compare("a", ["b", [CANARY]]),
        r"completions\[1\]\[0\] must be a message",
    ),
    "compare-none": (lambda c: c.compare(None, ["a", "b"]), "prompt must be a string or a list of messages"),
    "compare-nested": (lambda c: c.compare([CANARY], ["a", "b"]), r"prompt\[0\] must be a message"),
    "timeout-zero": (lambda c: c.wait_until_ready(0), "timeout_s must be a finite number of seconds above 0; it is 0"),
    "timeout-nan": (lambda c: c.wait_until_ready(float("nan")), "timeout_s must be a finite.*it is nan"),
    "reference": (lambda c: c.check_reference(""), "reference must be a checkpoint folder"),
}


@pytest.mark.parametrize(("call", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS.keys())
def test_wrong_arguments_of_a_call(server: FakeServer, call: Callable[[Any], object], message: str) -> None:
    """Each is an InvalidArgument that says what is wanted and repeats no text, and nothing is sent."""
    with RewardClient(server.url) as client, pytest.raises(InvalidArgument, match=message) as caught:
        call(client)

    assert CANARY not in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), ClientError)  # noqa: S301  (our own bytes)
    assert not server.requests


async def test_asynchronous_client_checks_too(server: FakeServer) -> None:
    """The asynchronous client raises the same exceptions."""
    async with AsyncRewardClient(server.url) as client:
        with pytest.raises(InvalidArgument, match="prompts must be a list"):
            await client.score("abc", "def")
        with pytest.raises(InvalidArgument, match="at least two"):
            await client.compare("a", [])

    assert not server.requests


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deadline_s": -1}, "deadline_s must be a finite number of seconds above 0; it is -1"),
        ({"deadline_s": float("inf")}, "deadline_s must be a finite"),
        ({"deadline_s": 10**400}, "deadline_s must be a finite"),
        ({"deadline_s": "5"}, "deadline_s must be a finite.*of type str"),
        ({"deadline_s": True}, "deadline_s must be a finite"),
        ({"deadline_s": None}, "deadline_s must be a finite"),
        ({"max_connections": 0}, "max_connections must be an integer of at least 1"),
        ({"max_connections": 2.5}, "max_connections must be an integer of at least 1"),
        ({"wait_for_start_s": -1}, "wait_for_start_s must be a finite number of seconds of at least 0"),
        ({"headers": [("X-Run-Id", "a")]}, "headers must be a dictionary"),
        ({"headers": {"X-Run-Id": 5}}, "The header X-Run-Id must be a string of printable ASCII characters"),
        ({"headers": {"Authorization": "Bearer secret\n"}}, "The header Authorization must be a string of printable"),
        ({"headers": {"X Run": "5"}}, "The name of a header must be"),
        ({"chunks": 5}, "chunks must be a ChunkLimits"),
        ({"retries": 5}, "retries must be a RetryPolicy"),
        ({"proxy": "proxy.example"}, "A proxy must be a URL that starts with"),
        ({"proxy": 5}, "A proxy must be a URL that starts with"),
        ({"reference": 5}, "reference must be a checkpoint folder"),
    ],
)
@pytest.mark.parametrize("client", [RewardClient, AsyncRewardClient])
def test_wrong_options_of_a_client(client: Any, options: dict[str, Any], message: str) -> None:
    """Options are checked when the client is made."""
    with pytest.raises(InvalidArgument, match=message) as caught:
        client("http://127.0.0.1:8000", **options)

    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ChunkLimits(max_items=0),
        lambda: ChunkLimits(max_bytes=1.5),  # type: ignore[arg-type]
        lambda: RetryPolicy(max_attempts=0),
        lambda: RetryPolicy(first_wait_s=float("nan")),
        lambda: RetryPolicy(max_wait_s=-1),
        lambda: RetryPolicy(read_timeout_s=0),
    ],
)
def test_wrong_policies(make: Callable[[], object]) -> None:
    """Limits and policies are checked when they are made."""
    with pytest.raises(InvalidArgument):
        make()


@pytest.mark.parametrize(
    "make",
    [list, tuple, iter, np.array, lambda values: np.array(values, dtype=object), deque],
    ids=["list", "tuple", "iterator", "array-of-str", "array-of-objects", "deque"],
)
def test_everything_with_ordered_elements_is_taken(server: FakeServer, make: Callable[[list[str]], Any]) -> None:
    """Lists, tuples, arrays of one dimension and generators give the same rewards."""
    with RewardClient(server.url) as client:
        rewards = client.score(make(["a", "b"]), make(["1", "2"]))

    assert rewards == [1.0, 2.0]
    assert server.requests[0].body["items"] == [
        {"prompt": "a", "completion": "1"},
        {"prompt": "b", "completion": "2"},
    ]


def test_numpy_numbers_are_numbers(server: FakeServer) -> None:
    """Options may be numbers of numpy."""
    options: dict[str, Any] = {"deadline_s": np.float32(30), "max_connections": np.int64(2)}
    with RewardClient(server.url, **options) as client:
        assert client.score(["a"], ["1"]) == [1.0]


def test_items_may_have_integer_ids_and_groups(server: FakeServer) -> None:
    """An id comes back as it was sent, and group 0 is a group like any other."""
    items = [{"prompt": f"{n}", "completion": "1", "id": n, "group": n // 2} for n in range(4)]
    with RewardClient(server.url, chunks=ChunkLimits(max_items=3)) as client:
        scored = client.score_items(items)

    assert [item.id for item in scored] == [0, 1, 2, 3]
    assert [len(request.body["items"]) for request in server.requests] == [2, 2]
