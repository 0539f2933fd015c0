"""OpenRLHF's remote reward model: what its versions send, and what their trainers can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from http_application import Application, application
from scored_texts import COMPLETION, ITEM, PROMPT, reward_of

from service.engines.oracle import NAN_BYTE, RAISE_BYTE
from service.protocols.base import sigmoid

KEYS = ["rm_tokens", "rm_truncated", "rm_completion_chars"]


async def test_answer_of_one_query(oracle: Application) -> None:
    """The body of version 0.11 gets lists of length one, with the reward of the query as it is."""
    body = {"query": ["a prompt an answer</s>"], "prompts": ["a prompt"], "labels": [None]}

    answer = await oracle.post("/get_reward", body)

    reward = reward_of("a prompt an answer</s>")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Reward-Activation"] == "none"
    assert answer.headers["X-Model-Version"] == "oracle"
    assert answer.headers["X-Request-Id"]
    assert answer.json() == {
        "rewards": [reward],
        "scores": [reward],
        "extra_logs": {"rm_tokens": [22.0], "rm_truncated": [0.0], "rm_completion_chars": [14.0]},
    }


async def test_micro_batch_of_old_versions(oracle: Application) -> None:
    """Versions up to 0.9 send several queries, without labels; rewards come in their order."""
    queries = [f"query {number}" for number in range(20)]

    answer = (await oracle.post("/get_reward", {"query": queries, "prompts": queries})).json()

    assert answer["rewards"] == answer["scores"] == [reward_of(query) for query in queries]


@pytest.mark.parametrize(
    "rest",
    [
        {},
        {"prompts": None, "labels": None},
        {"prompts": [], "labels": []},
        {"prompts": ["another prompt"], "labels": [{"answer": 1}]},
        {"prompts": [None]},
        {"prompts": [""]},
        {"prompts": 3, "unknown": [1]},
    ],
)
async def test_unusable_prompts_change_no_reward(oracle: Application, rest: dict[str, Any]) -> None:
    """Without a prompt that the query begins with, the reward is the same, and every key has a finite number."""
    answer = (await oracle.post("/get_reward", {"query": ["q"], **rest})).json()

    assert answer["rewards"] == [reward_of("q")]
    assert answer["extra_logs"] == {"rm_tokens": [1.0], "rm_truncated": [0.0], "rm_completion_chars": [-1.0]}


async def test_no_queries(oracle: Application) -> None:
    """An empty query is answered with empty lists and the same keys."""
    answer = await oracle.post("/get_reward", {"query": [], "prompts": [], "labels": []})

    assert answer.status_code == 200
    assert answer.json() == {"rewards": [], "scores": [], "extra_logs": {key: [] for key in KEYS}}


async def test_scores_may_be_squashed(tmp_path: Path) -> None:
    """With the setting the scores are the sigmoid of the rewards, which stay raw."""
    async with application(tmp_path, protocols={"openrlhf_scores": "sigmoid"}) as oracle:
        answer = (await oracle.post("/get_reward", {"query": ["q"]})).json()

    assert answer["rewards"] == [reward_of("q")]
    assert answer["scores"] == [sigmoid(reward_of("q"))]


@pytest.mark.parametrize(
    ("byte", "code"), [(NAN_BYTE, "non_finite_reward"), (RAISE_BYTE, "engine_failed")], ids=["nan", "raises"]
)
async def test_failed_item_fails_the_answer(oracle: Application, byte: int, code: str) -> None:
    """One item without a reward makes the whole answer a 500 without any reward."""
    answer = await oracle.post("/get_reward", {"query": ["good", f"bad{chr(byte)}"]})

    assert (answer.status_code, answer.json()["code"]) == (500, code)
    assert answer.headers["Content-Type"] == "application/json"
    assert "rewards" not in answer.json()


async def test_item_that_is_too_long(tmp_path: Path) -> None:
    """An item over the token limit is a 422, or is cut from the left with the route's own setting."""
    small = {"engine": "oracle", "max_input_tokens": 8}
    body = {"query": ["0123456789"], "prompts": ["01234"]}
    async with application(tmp_path, model=small) as oracle:
        refused = await oracle.post("/get_reward", body)
    async with application(tmp_path, model=small, protocols={"truncation": "prompt_left"}) as oracle:
        cut = await oracle.post("/get_reward", body)

    assert (refused.status_code, refused.json()["code"]) == (422, "sequence_too_long")
    assert cut.json()["rewards"] == [reward_of("23456789")]
    assert cut.json()["extra_logs"]["rm_truncated"] == [1.0]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "malformed_body"),
        (b'{"query": [1]}', 422, "invalid_request"),
        (b'{"prompts": ["p"]}', 422, "invalid_request"),
    ],
)
async def test_bad_bodies(oracle: Application, body: bytes, status: int, code: str) -> None:
    """A body that is not of the protocol is refused with a problem in JSON."""
    answer = await oracle.post("/get_reward", body)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize("prompts", [[], ["split"]], ids=["whole", "split"])
@pytest.mark.asyncio(loop_scope="session")
async def test_same_reward_as_the_native_route(model: Application, rendered: str, prompts: list[str]) -> None:
    """A text in the model's template, with its BOS, gets the reward of its prompt and completion."""
    if prompts:
        prompts = [rendered[: rendered.index(COMPLETION)]]

    answer = (await model.post("/get_reward", {"query": [rendered], "prompts": prompts})).json()

    assert answer["rewards"] == await model.rewards(ITEM) == await model.rewards({"text": rendered})
    chars = float(len(rendered) - len(prompts[0])) if prompts else -1.0
    assert answer["extra_logs"]["rm_completion_chars"] == [chars]


@pytest.mark.parametrize("prompts", [[], [PROMPT]], ids=["whole", "split"])
@pytest.mark.asyncio(loop_scope="session")
async def test_no_token_is_added(model: Application, prompts: list[str]) -> None:
    """A text without a BOS stays without one, whether the prompt is known or not."""
    answer = (await model.post("/get_reward", {"query": [PROMPT + COMPLETION], "prompts": prompts})).json()

    ids = tokens_of(model, PROMPT + COMPLETION)
    assert answer["rewards"] == await model.rewards({"token_ids": ids})
    assert answer["extra_logs"]["rm_tokens"] == [float(len(ids))]


def tokens_of(model: Application, text: str) -> list[int]:
    assert model.served.checkpoint is not None
    ids: list[int] = model.served.checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.asyncio(loop_scope="session")
async def test_p_values_of_a_calibrated_model(calibrated_model: Application) -> None:
    """A calibrated model has the key for p-values in every answer; it is -1 where the completion is not known."""
    body = {"query": [PROMPT + COMPLETION] * 2, "prompts": [PROMPT, "another"]}

    logs = (await calibrated_model.post("/get_reward", body)).json()["extra_logs"]
    empty = (await calibrated_model.post("/get_reward", {"query": []})).json()["extra_logs"]

    assert list(logs) == list(empty) == [*KEYS, "rm_ood_p"]
    known, unknown = logs["rm_ood_p"]
    assert 0.0 < known <= 1.0
    assert unknown == -1.0
