"""The real server: what only a started Ray Serve can show."""

import httpx2
import pytest

from service.engines.oracle import oracle_reward_of_text

pytestmark = pytest.mark.slow


def test_scores_through_the_proxy(server_url: str) -> None:
    """A reward crosses the proxy bit for bit."""
    body = {"items": [{"prompt": "a", "completion": "b"}]}

    answer = httpx2.post(f"{server_url}/v1/score", json=body)

    assert answer.status_code == 200
    assert answer.json()["results"][0]["reward"] == oracle_reward_of_text("a", "b")
