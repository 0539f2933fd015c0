"""A client that names its KL reference is told once when it is not what the reward model was initialised from."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from misbehaving_server import Request, World, ok, problem, running, scores
from reward_client import AsyncRewardClient, ReferenceWarning, RewardClient
from reward_client.errors import BadAnswer, ReferenceMismatch


@dataclass
class Comparing(World):
    """Was initialised from a checkpoint called sft, says so when asked, and scores."""

    answer_when_asked: Any = None

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.path.startswith("/v1/model"):
            yield self._compare(parse_qs(urlsplit(request.path).query)["reference"][0])
        else:
            yield ok(scores(request))

    def _compare(self, asked: str) -> bytes:
        if isinstance(self.answer_when_asked, bytes):
            return self.answer_when_asked
        check = {"asked": asked, "same": asked == "sft", "detail": "It comes from sft."}
        return ok(check if self.answer_when_asked else {"reference": check})

    def times_asked(self) -> int:
        return sum(request.path.startswith("/v1/model") for request in self.requests)


@pytest.fixture
def world() -> Iterator[Comparing]:
    with running(Comparing()) as comparing:
        yield comparing


def test_the_same_reference_is_no_news(world: Comparing) -> None:
    """One question at the first call, none later, and silence."""
    with RewardClient(world.url, reference="sft", require_reference=True) as client:
        assert client.score(["p", "p"], ["1", "2"]) == [1, 2]
        assert client.score(["p"], ["3"]) == [3]

    assert world.times_asked() == 1


def test_another_reference_is_told_once_and_stops_nobody(world: Comparing) -> None:
    """A warning of a class of its own; the rewards come all the same."""
    with RewardClient(world.url, reference="other") as client:
        with pytest.warns(ReferenceWarning, match="is another checkpoint.*It comes from sft"):
            assert client.score(["p"], ["1"]) == [1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert client.score(["p"], ["2"]) == [2]


async def test_who_requires_the_reference_gets_no_rewards_without_it(world: Comparing) -> None:
    """Every call raises, not only the first, and nothing is scored."""
    client = AsyncRewardClient(world.url, reference="other", require_reference=True)

    for _ in range(2):
        with pytest.raises(ReferenceMismatch, match="is another checkpoint"):
            await client.score(["p"], ["1"])
    await client.aclose()

    assert all(request.path.startswith("/v1/model") for request in world.requests)


@pytest.mark.parametrize(
    "answer",
    [True, problem("404 Not Found", "not_found"), ok({"reference": {"same": "perhaps"}})],
    ids=["says-nothing", "knows-no-route", "talks-nonsense"],
)
def test_a_service_that_cannot_tell_is_warned_about(answer: Any) -> None:
    """An older service scores all the same; what it cannot tell is told as such."""
    with (
        running(Comparing(answer_when_asked=answer)) as world,
        RewardClient(world.url, reference="sft") as client,
        pytest.warns(ReferenceWarning, match="may be another checkpoint"),
    ):
        assert client.score(["p"], ["1"]) == [1]


def test_a_folder_is_compared_by_its_weights(world: Comparing, tmp_path: Path) -> None:
    """The client hashes the folder where it lies; only the hash travels."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(hashlib.sha256(b"weights").hexdigest().encode()).hexdigest()

    with RewardClient(world.url) as client:
        check = client.check_reference(tmp_path)

    assert check.same is False
    assert world.requests[0].path == f"/v1/model?reference={digest}"
    with pytest.raises(ValueError, match="no safetensors files"):
        RewardClient(world.url, reference=tmp_path / "..")


def test_names_are_quoted(world: Comparing) -> None:
    """A hub id with its slash and an odd character reach the service as they are."""
    with RewardClient(world.url) as client:
        check = client.check_reference("org/sft v3&x=1")

    assert check.asked == "org/sft v3&x=1"
    assert world.requests[0].path == "/v1/model?reference=org%2Fsft%20v3%26x%3D1"


def test_asking_directly_does_not_hide_a_bad_answer() -> None:
    """Whoever asks wants to know that the answer was none."""
    with (
        running(Comparing(answer_when_asked=ok({"reference": 3}))) as world,
        RewardClient(world.url) as client,
        pytest.raises(BadAnswer),
    ):
        client.check_reference("sft")
