"""The remote reward model of slime and miles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from http_application import Application, application
from scored_texts import COMPLETION, ITEM, PROMPT, reward_of

from service.engines.oracle import PAD_TOKEN, oracle_reward

BODY = {"prompt": "prompt", "response": "answer", "label": None}


async def test_bare_number(oracle: Application) -> None:
    """The answer is the reward itself, as JSON."""
    answer = await oracle.post("/rm", BODY)

    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Reward-Activation"] == "none"
    assert answer.content == repr(reward_of("promptanswer")).encode()


@pytest.mark.parametrize("route", ["/rm?format=dict", "/rm/dict"])
async def test_object(oracle: Application, route: str) -> None:
    """With a reward key the answer is an object with flat numbers."""
    answer = (await oracle.post(route, BODY)).json()

    expected = {"reward": reward_of("promptanswer"), "length": 6, "tokens": 12, "truncated": 0, "concatenated": 0}
    assert answer == expected


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "p"},
        {"prompt": [], "response": "r"},
        {"prompt": ["p"], "response": "r"},
        {"prompt": "p", "response": ["r"]},
    ],
)
async def test_refusals(oracle: Application, body: dict[str, Any]) -> None:
    """A body without one prompt and one response is refused, never answered with a number."""
    answer = await oracle.post("/rm", body)

    assert answer.status_code == 422
    assert isinstance(answer.json(), dict)


async def test_unknown_format(oracle: Application) -> None:
    """A format that does not exist is refused."""
    assert (await oracle.post("/rm?format=xml", BODY)).status_code == 422


async def test_templated_prompt_is_recognised(oracle: Application) -> None:
    """A special token in the prompt shows that it is templated; the answer and a metric report it."""
    answer = (await oracle.post("/rm/dict", {"prompt": f"p{PAD_TOKEN}", "response": "r"})).json()
    await oracle.post("/rm", BODY)
    await oracle.post("/rm", {"prompt": "p", "response": "r"})

    assert (answer["reward"], answer["concatenated"]) == (oracle_reward([ord("p"), 256, ord("r")]), 1)
    sample = oracle.served.metrics.registry.get_sample_value
    assert sample("rm_slime_prompts_total", {"rendering": "concat"}) == 1.0
    assert sample("rm_slime_prompts_total", {"rendering": "chat"}) == 2.0


@pytest.mark.asyncio(loop_scope="session")
async def test_plain_prompt_is_rendered(model: Application) -> None:
    """A plain prompt and one of messages are rendered by the model's template."""
    plain = await model.post("/rm", {"prompt": PROMPT, "response": COMPLETION})
    turns = await model.post("/rm", {"prompt": [{"role": "user", "content": PROMPT}], "response": COMPLETION})

    assert [plain.json()] == [turns.json()] == await model.rewards(ITEM)


@pytest.mark.asyncio(loop_scope="session")
async def test_templated_prompt_is_concatenated(model: Application, rendered: str) -> None:
    """A prompt in the actor's template, which ends in the generation prompt, gets the response and no second BOS."""
    prompt = rendered[: rendered.index(COMPLETION)]

    answer = (await model.post("/rm/dict", {"prompt": prompt, "response": COMPLETION})).json()

    assert answer["concatenated"] == 1
    assert [answer["reward"]] == await model.rewards({"text": prompt + COMPLETION})
    assert [answer["reward"]] != await model.rewards(ITEM)


async def test_template_setting(tmp_path: Path) -> None:
    """The setting decides instead of the prompt's text."""
    async with application(tmp_path, protocols={"slime_template": "concat"}) as oracle:
        concatenated = (await oracle.post("/rm/dict", BODY)).json()
    async with application(tmp_path, protocols={"slime_template": "chat"}) as oracle:
        no_template = await oracle.post("/rm", BODY)

    assert (concatenated["reward"], concatenated["concatenated"]) == (reward_of("promptanswer"), 1)
    assert (no_template.status_code, no_template.json()["code"]) == (422, "invalid_request")


@pytest.mark.asyncio(loop_scope="session")
async def test_p_value_of_a_calibrated_model(calibrated_model: Application) -> None:
    """The object has the p-value of the native route."""
    native = await calibrated_model.post("/v1/score", {"items": [ITEM], "diagnostics": "full"})

    answer = (await calibrated_model.post("/rm/dict", {"prompt": PROMPT, "response": COMPLETION})).json()

    result = native.json()["results"][0]
    assert (answer["reward"], answer["ood_p"]) == (result["reward"], result["ood"]["p_value"])
