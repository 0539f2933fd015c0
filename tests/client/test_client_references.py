"""The client warns once if the reward model was not initialised from the KL reference that it names."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from misbehaving_server import FakeServer, Request, ok, problem, running, scores
from reward_client import AsyncRewardClient, ReferenceWarning, RewardClient
from reward_client.errors import BadAnswer, ReferenceMismatch


@dataclass
class CheckingServer(FakeServer):
    """Its model was initialised from a checkpoint named sft; it answers the reference check and scores."""

    check_answer: Any = None

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.path.startswith("/v1/model"):
            yield self._check(parse_qs(urlsplit(request.path).query)["reference"][0])
        else:
            yield ok(scores(request))

    def _check(self, asked: str) -> bytes:
        if isinstance(self.check_answer, bytes):
            return self.check_answer
        check = {"asked": asked, "same": asked == "sft", "detail": "It comes from sft."}
        return ok(check if self.check_answer else {"reference": check})

    def num_checks(self) -> int:
        return sum(request.path.startswith("/v1/model") for request in self.requests)


@pytest.fixture
def server() -> Iterator[CheckingServer]:
    with running(CheckingServer()) as running_server:
        yield running_server


def test_the_same_reference_causes_no_warning(server: CheckingServer) -> None:
    """It is checked in the first call only, and nothing is warned of."""
    with RewardClient(server.url, reference="sft", require_reference=True) as client:
        assert client.score(["p", "p"], ["1", "2"]) == [1, 2]
        assert client.score(["p"], ["3"]) == [3]

    assert server.num_checks() == 1


def test_another_reference_is_warned_of_once(server: CheckingServer) -> None:
    """The warning is a ReferenceWarning, and the rewards are returned."""
    with RewardClient(server.url, reference="other") as client:
        with pytest.warns(ReferenceWarning, match="is another checkpoint.*It comes from sft"):
            assert client.score(["p"], ["1"]) == [1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert client.score(["p"], ["2"]) == [2]


async def test_a_required_reference_that_differs_is_an_error(server: CheckingServer) -> None:
    """Every call raises, not only the first, and nothing is scored."""
    client = AsyncRewardClient(server.url, reference="other", require_reference=True)

    for _ in range(2):
        with pytest.raises(ReferenceMismatch, match="is another checkpoint"):
            await client.score(["p"], ["1"])
    await client.aclose()

    assert all(request.path.startswith("/v1/model") for request in server.requests)


@pytest.mark.parametrize(
    "answer",
    [True, problem("404 Not Found", "not_found"), ok({"reference": {"same": "perhaps"}})],
    ids=["no-comparison", "no-route", "invalid-answer"],
)
def test_an_undecided_check_is_warned_of(answer: Any) -> None:
    """Where the service does not answer the check, the client warns that the reference is unknown, and scores."""
    with (
        running(CheckingServer(check_answer=answer)) as server,
        RewardClient(server.url, reference="sft") as client,
        pytest.warns(ReferenceWarning, match="may be another checkpoint"),
    ):
        assert client.score(["p"], ["1"]) == [1]


def test_a_folder_is_compared_by_its_weights(server: CheckingServer, tmp_path: Path) -> None:
    """The client hashes the local folder and sends the hash only."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    digest = hashlib.sha256(hashlib.sha256(b"weights").hexdigest().encode()).hexdigest()

    with RewardClient(server.url) as client:
        check = client.check_reference(tmp_path)

    assert check.same is False
    assert server.requests[0].path == f"/v1/model?reference={digest}"
    with pytest.raises(ValueError, match="no safetensors files"):
        RewardClient(server.url, reference=tmp_path / "..")


def test_names_are_quoted(server: CheckingServer) -> None:
    """A hub id with a slash and special characters reaches the service unchanged."""
    with RewardClient(server.url) as client:
        check = client.check_reference("org/sft v3&x=1")

    assert check.asked == "org/sft v3&x=1"
    assert server.requests[0].path == "/v1/model?reference=org%2Fsft%20v3%26x%3D1"


def test_an_explicit_check_raises_for_a_bad_answer() -> None:
    """``check_reference`` raises where the answer is invalid."""
    with (
        running(CheckingServer(check_answer=ok({"reference": 3}))) as server,
        RewardClient(server.url) as client,
        pytest.raises(BadAnswer),
    ):
        client.check_reference("sft")
