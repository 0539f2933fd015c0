"""The route of Text Embeddings Inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from http_application import Application, application
from scored_texts import COMPLETION, ITEM, PROMPT, reward_of

from service.protocols.base import sigmoid


def prediction(text: str) -> dict[str, Any]:
    return {"score": reward_of(text), "label": "LABEL_0"}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("a", [prediction("a")]),
        ([["a"], ["b"]], [[prediction("a")], [prediction("b")]]),
        ([["a", "b"]], [[prediction("ab")]]),
    ],
    ids=["text", "texts", "pair"],
)
async def test_forms_of_inputs(oracle: Application, inputs: Any, expected: Any) -> None:
    """A text gets a list, a batch a list of lists, with raw rewards as scores."""
    answer = await oracle.post("/predict", {"inputs": inputs, "raw_scores": True, "truncate": True})

    assert answer.status_code == 200
    assert answer.json() == expected


@pytest.mark.parametrize("inputs", [["a", "b"], ["a"], [], [[]], [["a"], ["a", "b"]], [["a", "b", "c"]]])
async def test_ambiguous_inputs(oracle: Application, inputs: Any) -> None:
    """A list of strings may be a pair or a batch, so it is refused; so are mixed and empty forms."""
    answer = await oracle.post("/predict", {"inputs": inputs})

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_activation(tmp_path: Path) -> None:
    """``raw_scores: false`` asks for a sigmoid, which is refused unless the settings allow it."""
    body = {"inputs": "a", "raw_scores": False}
    async with application(tmp_path) as oracle:
        refused = await oracle.post("/predict", body)
    async with application(tmp_path, protocols={"activation": "sigmoid"}) as oracle:
        squashed = await oracle.post("/predict", body)

    assert refused.status_code == 422
    assert squashed.json()[0]["score"] == sigmoid(reward_of("a"))
    assert squashed.headers["X-Reward-Activation"] == "sigmoid"


async def test_truncation(tmp_path: Path) -> None:
    """What is too long is cut from the left if that is asked for, and otherwise refused."""
    body = {"inputs": "0123456789", "truncate": True}
    async with application(tmp_path, model={"engine": "oracle", "max_input_tokens": 8}) as oracle:
        cut = await oracle.post("/predict", body | {"truncation_direction": "Left"})
        right = await oracle.post("/predict", body)

    assert cut.json() == [prediction("23456789")]
    assert (right.status_code, right.json()["code"]) == (422, "sequence_too_long")


@pytest.mark.asyncio(loop_scope="session")
async def test_same_reward_as_the_native_route(model: Application, rendered: str) -> None:
    """A text in the model's template and a pair get the reward of their prompt and completion."""
    text = await model.post("/predict", {"inputs": rendered})
    pair = await model.post("/predict", {"inputs": [[PROMPT, COMPLETION]]})

    assert [text.json()[0]["score"]] == [pair.json()[0][0]["score"]] == await model.rewards(ITEM)
