"""Rewards at steps over HTTP: forms of an item, aggregates, batches, errors, protocols, clients and the cache."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from process_models import PROMPT, STEPS, qwen_rewards, qwen_text, write_qwen_prm
from reward_client import AsyncRewardClient, RewardClient
from reward_client.errors import InvalidArgument, ItemsFailed
from serving import serving

from export.convert import convert

pytestmark = pytest.mark.slow

OPTIONS = ("--model.device", "cpu", "--model.dtype", "float32", "--model.num_threads", "1")
MARKED = "".join(f"{step}<extra_0>" for step in STEPS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A process reward model as it is published, and converted."""
    root = tmp_path_factory.mktemp("process")
    source, out = write_qwen_prm(root / "source"), root / "out"
    convert(source, out)
    return source, out


@pytest.fixture(scope="module")
def logits(folders: tuple[Path, Path]) -> list[list[float]]:
    return qwen_rewards(*folders, STEPS)


@pytest.fixture(scope="module")
def expected(logits: list[list[float]]) -> list[float]:
    rewards: list[float] = torch.tensor(logits).softmax(1)[:, 1].tolist()
    return rewards


@pytest.fixture(scope="module")
def url(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, "--model", str(folders[1]), *OPTIONS, runtime="local") as server:
        yield server.url


def post(url: str, route: str = "/v1/score", **body: Any) -> Any:
    answer = httpx2.post(url + route, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def item(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "steps": list(STEPS), **fields}


def test_neither_the_batch_nor_the_cache_changes_a_step(url: str, expected: list[float]) -> None:
    """Step rewards are those of the independent reading alone, among other items with the same prompt, and cached."""
    prefixes = [item(steps=list(STEPS[:count]), id=count) for count in range(1, len(STEPS) + 1)]
    others: list[dict[str, Any]] = [
        {"prompt": PROMPT, "completion": MARKED},
        {"prompt": "Another?", "steps": ["a", "b"]},
    ]
    for turn in range(4):
        items = random.Random(turn).sample(prefixes + others, len(prefixes) + len(others))
        answer = post(url, items=items)
        for given, result in zip(items, answer["results"], strict=True):
            if "id" in given:
                assert result["step_rewards"] == pytest.approx(expected[: given["id"]], abs=1e-4)
        assert answer["usage"]["shared_tokens"] > 0


def test_the_aggregate_is_named(url: str, folders: tuple[Path, Path], tmp_path: Path, expected: list[float]) -> None:
    """The reward is the minimum, as the description says, or what the setting says; the model's version covers that."""
    product = torch.tensor(expected, dtype=torch.float64).prod().item()
    with serving(
        tmp_path, "--model", str(folders[1]), *OPTIONS, "--model.step_aggregate", "product", runtime="local"
    ) as server:
        (result,) = post(server.url, items=[item()])["results"]
        other = httpx2.get(server.url + "/v1/model").json()
    assert result["reward"] == pytest.approx(product, abs=1e-4)
    own = httpx2.get(url + "/v1/model").json()
    assert (own["steps"]["aggregate"], other["steps"]["aggregate"]) == ("min", "product")
    assert own["steps"]["marker"] == "<extra_0>"
    assert own["model"]["version"] != other["model"]["version"]


def test_an_item_whose_steps_cannot_be_read_fails_alone(url: str) -> None:
    """Each has its own error, and the others have their rewards."""
    items = [
        item(),
        item(steps=["a<extra_0>b"]),
        {"text": "no marker", "steps": "marker"},
        {"prompt": PROMPT, "completion": MARKED, "steps": "marker"},
    ]
    good, twice, none, marked = post(url, items=items)["results"]

    assert "2 markers for 1 steps" in twice["error"]["detail"]
    assert "no marker token" in none["error"]["detail"]
    assert marked["step_rewards"] == pytest.approx(good["step_rewards"], abs=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": []},
        {"steps": [""]},
        {"steps": "lines"},
        {"completion": "a"},
        {"step_token_id": 3},
        {"steps": ["a"] * 513},
    ],
)
def test_a_malformed_request_is_refused(url: str, fields: dict[str, Any]) -> None:
    """The whole request is refused with the place of the field, before anything is computed."""
    answer = httpx2.post(url + "/v1/score", json={"items": [item(**fields)]}, timeout=60)

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].startswith("/items/0")


def test_turns_of_any_model_are_its_rewards_up_to_them(url: str) -> None:
    """The outputs at a turn are those of the same conversation cut off after it, as an item of its own."""
    turns = []
    for text in STEPS:
        turns += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    whole = {"prompt": PROMPT, "completion": turns[:-1], "steps": "turns"}
    parts = [{"prompt": PROMPT, "completion": turns[: 2 * count + 1], "steps": "turns"} for count in range(len(STEPS))]

    result, *alone = post(url, items=[whole, *parts])["results"]

    for outputs, part in zip(result["step_outputs"], alone, strict=True):
        assert outputs == pytest.approx(part["step_outputs"][-1], abs=1e-5)


def test_pooling_answers_as_vllm_does(url: str, logits: list[list[float]], expected: list[float]) -> None:
    """A vector of probabilities for each step, raw logits where no activation is asked for; classes get the reward."""
    text = qwen_text(STEPS)
    (entry,) = post(url, "/pooling", input=[text])["data"]
    (raw,) = post(url, "/pooling", input=[text], use_activation=False)["data"]
    (packed,) = post(url, "/pooling", input=[text], encoding_format="base64")["data"]
    (classes,) = post(url, "/classify", input=[text])["data"]

    probabilities = [[1 - value, value] for value in expected]
    for found, own in ((entry["data"], probabilities), (raw["data"], logits)):
        for step, values in zip(found, own, strict=True):
            assert step == pytest.approx(values, abs=1e-4)
    numbers = struct.unpack(f"<{2 * len(STEPS)}f", base64.b64decode(packed["data"]))
    assert list(numbers) == pytest.approx([value for step in probabilities for value in step], abs=1e-4)
    assert classes["probs"] == pytest.approx([min(expected)], abs=1e-4)
    unmarked = httpx2.post(url + "/pooling", json={"input": ["no marker"]}, timeout=60)
    assert unmarked.status_code == 422


def test_the_synchronous_client(url: str, expected: list[float]) -> None:
    """Steps as lists give rewards, and with diagnostics step rewards; wrong arguments are refused before sending."""
    with RewardClient(url) as client:
        assert client.score([PROMPT], steps=[list(STEPS)]) == pytest.approx([min(expected)], abs=1e-4)
        (scored,) = client.score([PROMPT], [MARKED], steps="marker", diagnostics="basic")
        assert scored.step_rewards == pytest.approx(expected, abs=1e-4)
        assert set(scored.step_outputs[0]) == {"negative", "positive"}
        assert "step_rewards" not in scored.diagnostics
        refused: list[dict[str, Any]] = [{"completions": ["a"], "steps": [["a"]]}, {"steps": [[]]}, {"steps": "marker"}]
        for arguments in refused:
            with pytest.raises(InvalidArgument):
                client.score([PROMPT], **arguments)
        with pytest.raises(ItemsFailed, match="no marker token"):
            client.score([PROMPT], ["none"], steps="marker")


async def test_the_asynchronous_client(url: str, expected: list[float]) -> None:
    """It takes the same steps."""
    async with AsyncRewardClient(url) as client:
        (scored,) = await client.score([PROMPT], steps=[list(STEPS)], diagnostics="none")

    assert scored.step_rewards == pytest.approx(expected, abs=1e-4)
