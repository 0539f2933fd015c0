"""vLLM's pooling routes, as verl and its other clients use them."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import pytest
from http_application import Application, application
from scored_texts import COMPLETION, ITEM, PROMPT, reward_of
from tiny_models import write_tiny_checkpoint
from transformers import AutoTokenizer

from service.engines.oracle import NAN_BYTE, oracle_reward
from service.protocols.base import sigmoid

BOS = "<s>"


async def test_answer_to_verl(oracle: Application) -> None:
    """The body of verl gets vLLM's envelope, with the raw reward as the only probability of the last entry."""
    body = {"model": "/a/path", "input": "text", "use_activation": False}

    answer = await oracle.post("/classify", body, **{"X-Request-Id": "r1"})

    envelope = answer.json()
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Reward-Activation"] == "none"
    assert isinstance(envelope.pop("created"), int)
    assert envelope == {
        "id": "classify-r1",
        "object": "list",
        "model": "oracle",
        "data": [
            {
                "index": 0,
                "label": None,
                "probs": [reward_of("text")],
                "num_classes": 1,
                "tokens": 4,
                "truncated": False,
            }
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0},
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a", [oracle_reward([97])]),
        (["a", "b"], [oracle_reward([97]), oracle_reward([98])]),
        ([97, 98], [oracle_reward([97, 98])]),
        ([[97, 98], [99]], [oracle_reward([97, 98]), oracle_reward([99])]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
@pytest.mark.parametrize("route", ["/classify", "/v1/classify"])
async def test_forms_of_input(oracle: Application, route: str, given: Any, expected: list[float]) -> None:
    """Each form of input gives one entry per item, in order."""
    answer = (await oracle.post(route, {"input": given})).json()

    assert [entry["probs"] for entry in answer["data"]] == [[reward] for reward in expected]
    assert [entry["index"] for entry in answer["data"]] == list(range(len(expected)))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": None},
        {"input": "a", "messages": []},
        {"input": []},
        {"input": [[]]},
        {"input": ["a", 1]},
        {"input": [-1]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}] * 2},
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "add_generation_prompt": True,
        },
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "add_special_tokens": True,
        },
        {"input": "a", "truncate_prompt_tokens": -2},
        *(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], **option}
            for option in (
                {"chat_template": "{{ messages }}"},
                {"tools": ["a name"]},
                {"chat_template_kwargs": {"enable_thinking": ["no"]}},
                {"continue_final_message": True},
            )
        ),
    ],
)
async def test_what_is_not_understood_is_refused(oracle: Application, body: dict[str, Any]) -> None:
    """No reward is made up for a body that has no item, several readings, or an unsupported option."""
    answer = await oracle.post("/classify", body)

    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["errors"], "refused before tokenization, with a pointer"


@pytest.mark.parametrize("flag", ["use_activation", "activation", "softmax"])
async def test_activation(tmp_path: Path, flag: str) -> None:
    """A sigmoid that is asked for is refused, or given where the settings allow it, and never without being asked."""
    async with application(tmp_path) as oracle:
        refused = await oracle.post("/classify", {"input": "a", flag: True})
        raw = await oracle.post("/classify", {"input": "a", flag: False})
    async with application(tmp_path, protocols={"activation": "sigmoid"}) as oracle:
        squashed = await oracle.post("/classify", {"input": "a", flag: True})
        absent = await oracle.post("/classify", {"input": "a"})

    assert refused.status_code == 422
    assert refused.json()["errors"] == [{"pointer": f"/{flag}", "code": "activation_refused"}]
    assert raw.json()["data"][0]["probs"] == absent.json()["data"][0]["probs"] == [reward_of("a")]
    assert squashed.json()["data"][0]["probs"] == [sigmoid(reward_of("a"))]
    assert (squashed.headers["X-Reward-Activation"], absent.headers["X-Reward-Activation"]) == ("sigmoid", "none")


async def test_truncation(tmp_path: Path) -> None:
    """Tokens are dropped on the left alone, and to the model's limit alone; a shorter limit refuses."""
    long, short = "0123456789", "01234567"
    async with application(tmp_path, model={"engine": "oracle", "max_input_tokens": 8}) as oracle:

        async def ask(text: str, limit: int, side: str | None = None) -> Any:
            body = {"input": text, "truncate_prompt_tokens": limit, "truncation_side": side}
            answer = await oracle.post("/classify", body)
            return answer.json()["data"][0] if answer.status_code == 200 else answer.json()["code"]

        from_left = await ask(long, -1, "left")
        assert (from_left["probs"], from_left["truncated"]) == ([reward_of("23456789")], True)
        assert (await ask(long, 100, "left"))["probs"] == [reward_of("23456789")]
        assert await ask(long, -1) == await ask(long, -1, "right") == "sequence_too_long"
        assert await ask(short, 4, "left") == "sequence_too_long"
        assert (await ask(short, 8))["probs"] == [reward_of(short)]


async def test_failed_item_fails_the_answer(oracle: Application) -> None:
    """One reward that is not finite makes the whole answer a 500, which verl repeats."""
    answer = await oracle.post("/classify", {"input": ["a", chr(NAN_BYTE)]})

    assert (answer.status_code, answer.json()["code"]) == (500, "non_finite_reward")


@pytest.mark.asyncio(loop_scope="session")
async def test_one_leading_bos(model: Application, rendered: str) -> None:
    """The BOS that verl cuts from the text is added again, and never a second one."""
    assert rendered.startswith(BOS)
    inputs = [rendered, rendered.removeprefix(BOS)]

    whole, cut = (await model.post("/classify", {"input": inputs})).json()["data"]
    bare = (await model.post("/classify", {"input": inputs[1], "add_special_tokens": False})).json()["data"][0]

    assert [whole["probs"], cut["probs"]] == [await model.rewards(ITEM)] * 2
    assert whole["tokens"] == cut["tokens"] == bare["tokens"] + 1
    assert bare["probs"] != cut["probs"]


@pytest.mark.asyncio(loop_scope="session")
async def test_one_conversation(model: Application) -> None:
    """Messages are rendered by the model's template, without a generation prompt."""
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}]

    answer = (await model.post("/classify", {"messages": messages})).json()

    assert answer["data"][0]["probs"] == await model.rewards(ITEM)


async def test_pooling(oracle: Application) -> None:
    """``/pooling`` gives vectors of length one, as numbers or as base64 of float32."""
    numbers = (await oracle.post("/pooling", {"input": ["a", "b"]})).json()
    coded = (await oracle.post("/pooling", {"input": "a", "encoding_format": "base64"})).json()

    assert [(entry["object"], entry["data"]) for entry in numbers["data"]] == [
        ("pooling", [reward_of("a")]),
        ("pooling", [reward_of("b")]),
    ]
    assert struct.unpack("<f", base64.b64decode(coded["data"][0]["data"])) == (reward_of("a"),)


@pytest.mark.parametrize("route", ["/score", "/v1/score"])
@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
async def test_pairs(oracle: Application, route: str, names: tuple[str, str]) -> None:
    """Prompts and completions by either name give raw rewards; one prompt stands before all completions."""
    one = (await oracle.post(route, {names[0]: "p", names[1]: ["a", "b"]})).json()
    each = (await oracle.post(route, {names[0]: ["p", "q"], names[1]: ["a", "b"], "model": "m"})).json()

    assert [(entry["index"], entry["object"]) for entry in one["data"]] == [(0, "score"), (1, "score")]
    assert [entry["score"] for entry in one["data"]] == [reward_of("pa"), reward_of("pb")]
    assert [entry["score"] for entry in each["data"]] == [reward_of("pa"), reward_of("qb")]


@pytest.mark.parametrize(
    "body",
    [
        {"text_1": "p"},
        {"text_1": "p", "queries": "p", "text_2": "c"},
        {"text_1": ["p", "q"], "text_2": ["a", "b", "c"]},
        {"text_1": "p", "text_2": []},
    ],
)
async def test_pairs_that_do_not_match(oracle: Application, body: dict[str, Any]) -> None:
    """Prompts that do not go with the completions are refused."""
    assert (await oracle.post("/score", body)).status_code == 422


@pytest.mark.asyncio(loop_scope="session")
async def test_pairs_are_prompt_and_completion(model: Application) -> None:
    """A pair is rendered as a prompt and its completion of the native route."""
    answer = (await model.post("/score", {"text_1": PROMPT, "text_2": COMPLETION})).json()

    assert [answer["data"][0]["score"]] == await model.rewards(ITEM)


@pytest.mark.parametrize(("route", "key"), [("/classify", "probs"), ("/v1/embeddings", "embedding")])
async def test_a_cut_bos_that_the_tokenizer_does_not_add(tmp_path: Path, route: str, key: str) -> None:
    """Where the template alone writes a BOS, a conversation without it gets it again, and the answer says so."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model", "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.bos_token = BOS
    tokenizer.save_pretrained(checkpoint)
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": COMPLETION}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert rendered.startswith(BOS)
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    cut = rendered.removeprefix(BOS)

    settings = {"path": str(checkpoint), "num_threads": 1, "kernels": "off"}
    async with application(tmp_path, model=settings, batching={"deterministic": True}) as model:
        data = (await model.post(route, {"input": [rendered, cut, PROMPT]})).json()["data"]
        as_it_is = (await model.post(route, {"input": [cut], "add_special_tokens": True})).json()["data"]
        [reward] = await model.rewards(ITEM)
        [plain, unchanged] = await model.rewards({"text": PROMPT}, {"text": cut})

    assert [entry[key] for entry in data] == [[reward], [reward], [plain]]
    assert [entry.get("bos_added") for entry in data] == [None, True, None]
    assert [entry[key] for entry in as_it_is] == [[unchanged]]
    assert unchanged != reward
