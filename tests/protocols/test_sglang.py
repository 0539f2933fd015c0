"""SGLang's routes, as verl and its other clients use them."""

from __future__ import annotations

from typing import Any

import pytest
from http_application import Application
from scored_texts import ITEM, PROMPT, reward_of

from service.engines.oracle import oracle_reward


async def test_answer_to_verl(oracle: Application) -> None:
    """The body of verl gets an embedding of length one, which is the raw reward."""
    answer = await oracle.post("/v1/embeddings", {"model": "/a/path", "input": "text"})

    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == {
        "object": "list",
        "model": "oracle",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [reward_of("text")], "tokens": 4, "truncated": False}
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0},
    }


@pytest.mark.asyncio(loop_scope="session")
async def test_bos_is_added(model: Application, rendered: str) -> None:
    """The BOS that verl cuts from the text is added again."""
    answer = (await model.post("/v1/embeddings", {"input": rendered.removeprefix("<s>")})).json()

    assert answer["data"][0]["embedding"] == await model.rewards(ITEM)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"query": "q", "items": ["a", "b"]}, [reward_of("qa"), reward_of("qb")]),
        ({"query": "q", "items": "a", "label_token_ids": [1], "model": "m"}, [reward_of("qa")]),
        ({"query": "q", "items": ["a"], "item_first": True}, [reward_of("aq")]),
        ({"query": [97], "items": [[98], []]}, [oracle_reward([97, 98]), oracle_reward([97])]),
    ],
)
async def test_query_with_items(oracle: Application, body: dict[str, Any], expected: list[float]) -> None:
    """A body with ``query`` on the native path gets one list with the raw reward per item."""
    answer = await oracle.post("/v1/score", body)

    assert answer.status_code == 200
    assert answer.json()["object"] == "scoring"
    assert answer.json()["scores"] == [[reward] for reward in expected]
    assert answer.headers["X-Reward-Activation"] == "none"


@pytest.mark.parametrize(
    "body",
    [
        {"query": "q", "items": []},
        {"query": "q", "items": [[1]]},
        {"query": [1], "items": "a"},
        {"query": [], "items": [[]]},
        {"query": "q", "items": ["a"], "apply_softmax": True},
    ],
)
async def test_query_refusals(oracle: Application, body: dict[str, Any]) -> None:
    """Mixed forms, no items and an activation are refused."""
    answer = await oracle.post("/v1/score", body)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.headers["Content-Type"] == "application/json"


async def test_native_body_that_mentions_the_key(oracle: Application) -> None:
    """A native body whose texts contain the word stays native, and a native mistake is explained as such."""
    text = '"query": "text_1"'
    answer = await oracle.post("/v1/score", {"items": [{"text": text}]})
    mistaken = await oracle.post("/v1/score", {"items": [{"query": "a"}]})

    assert answer.json()["results"][0]["reward"] == reward_of(text)
    assert mistaken.json()["detail"].startswith('Unknown field "query"')


@pytest.mark.asyncio(loop_scope="session")
async def test_text_as_the_tokenizer_does_it(model: Application) -> None:
    """Query and item are one text, with the BOS of the tokenizer."""
    answer = (await model.post("/v1/score", {"query": PROMPT, "items": [" Yes."]})).json()

    assert answer["scores"] == [await model.rewards({"prompt": PROMPT, "completion": " Yes."}, template="concat")]
