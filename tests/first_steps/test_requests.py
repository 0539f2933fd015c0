"""Wrong requests to a running service: each gets a problem that names the field and what is wanted, and does no harm.

The requests are in requests.toml; a field is a field of ``Wrong``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
from serving import serving

FILE = Path(__file__).with_name("requests.toml")

GOOD = {"items": [{"prompt": "How do I boil an egg?", "completion": "In water."}]}


@dataclass(frozen=True, slots=True)
class Wrong:
    """A request with a mistake, and the problem that it deserves."""

    name: str
    status: int
    code: str
    says: list[str]
    """Parts of the detail."""

    path: str = "/v1/score"
    method: str = "POST"
    body: str | None = None
    """``{300 characters}`` stands for as many."""

    headers: dict[str, str] = field(default_factory=dict)
    """Besides ``Content-Type: application/json``."""

    pointer: str | None = None
    """JSON pointer to the field; None: the mistake is not in a field."""

    error: str | None = None
    """Kind of the mistake in the field."""

    allow: str | None = None
    """The header of this name."""


REQUESTS = [Wrong(**row) for row in tomllib.loads(FILE.read_text())["request"]]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a service of the oracle, without Ray."""
    folder = tmp_path_factory.mktemp("local")
    with (
        serving(folder, "--engine", "oracle", runtime="local") as server,
        httpx2.Client(base_url=server.url, trust_env=False, timeout=10.0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def reward(client: httpx2.Client) -> float:
    """The reward of the good request before any wrong one."""
    return score(client)


def score(client: httpx2.Client) -> float:
    answer = client.post("/v1/score", json=GOOD)
    assert answer.status_code == 200, answer.text
    return float(answer.json()["results"][0]["reward"])


def test_names_are_unique() -> None:
    """Every request has a name of its own, so that every one is sent."""
    assert len({wrong.name for wrong in REQUESTS}) == len(REQUESTS) >= 50


@pytest.mark.parametrize("wrong", REQUESTS, ids=lambda wrong: wrong.name)
def test_a_wrong_request_gets_a_problem(wrong: Wrong, client: httpx2.Client, reward: float) -> None:
    """Status, code, field and remedy are right, and the next good request gets the same reward as before."""
    body = None if wrong.body is None else wrong.body.replace("{300 characters}", "x" * 300)

    answer = client.request(
        wrong.method, wrong.path, content=body, headers={"Content-Type": "application/json"} | wrong.headers
    )

    assert answer.status_code == wrong.status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (problem["status"], problem["code"], problem["retryable"]) == (wrong.status, wrong.code, False)
    for part in wrong.says:
        assert part in problem["detail"]
    named = [(error["pointer"], error["code"]) for error in problem.get("errors", [])]
    assert named == ([] if wrong.pointer is None else [(wrong.pointer, wrong.error)])
    assert answer.headers.get("allow") == wrong.allow
    assert score(client) == reward
