"""LLaMA-Factory's reward server."""

from __future__ import annotations

import pytest
from http_application import Application
from scored_texts import ITEM, reward_of

from service.engines.oracle import NAN_BYTE


async def test_answer(oracle: Application) -> None:
    """The body of its trainer gets flat scores in order, in the envelope of its own server."""
    body = {"model": "model", "messages": ["first", "second"]}

    answer = await oracle.post("/v1/score/evaluation", body, **{"X-Request-Id": "step-7"})

    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "id": "scoreval-step-7",
        "object": "score.evaluation",
        "model": "oracle",
        "scores": [reward_of("first"), reward_of("second")],
    }


async def test_length_limit_of_the_request(oracle: Application) -> None:
    """No text is cut to ``max_length``: a longer one is refused, others are scored whole."""
    fits = await oracle.post("/v1/score/evaluation", {"messages": ["123"], "max_length": 3})
    longer = await oracle.post("/v1/score/evaluation", {"messages": ["123", "1234"], "max_length": 3})

    assert fits.json()["scores"] == [reward_of("123")]
    assert (longer.status_code, longer.json()["code"]) == (422, "sequence_too_long")


@pytest.mark.parametrize(
    ("messages", "status"),
    [([], 422), ([["a"]], 422), ([{"role": "user", "content": "a"}], 422), (["a", chr(NAN_BYTE)], 500)],
)
async def test_refusals(oracle: Application, messages: list[object], status: int) -> None:
    """No scores, chat messages in place of texts, or a reward that is not finite: there is no field ``scores``."""
    answer = await oracle.post("/v1/score/evaluation", {"model": "model", "messages": messages})

    assert answer.status_code == status
    assert "scores" not in answer.json()


@pytest.mark.asyncio(loop_scope="session")
async def test_same_reward_as_the_native_route(model: Application, rendered: str) -> None:
    """A text in the model's template gets the reward of its prompt and completion: no second BOS is added."""
    answer = await model.post("/v1/score/evaluation", {"messages": [rendered]})

    assert answer.json()["scores"] == await model.rewards(ITEM)
