"""A model with two named outputs, served without Ray: rewards, weights, comparisons, protocols, metrics and clients."""

from __future__ import annotations

import base64
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from objective_models import OUTPUTS, WEIGHTS, expected_outputs, weighted_sum, write_two_outputs
from prometheus_client.parser import text_string_to_metric_families
from reward_client import AsyncRewardClient, RewardClient
from reward_client.errors import RequestRejected, RewardMissing
from serving import serving
from tiny_models import SENTENCES

pytestmark = pytest.mark.slow

TEXTS = [*SENTENCES, "Short.", SENTENCES[0] + " And another sentence.", SENTENCES[0] + " And one more."]
OPTIONS = ("--model.device", "cpu", "--model.dtype", "float32", "--model.num_threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_two_outputs(tmp_path_factory.mktemp("objectives") / "model", weights=WEIGHTS)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[float]]:
    return expected_outputs(folder, TEXTS)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the model, whose checkpoint has weights."""
    with serving(tmp_path_factory.mktemp("server"), "--model", str(folder), *OPTIONS, runtime="local") as server:
        yield server.url


@pytest.fixture(scope="module")
def bare_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of a model without weights."""
    folder = write_two_outputs(tmp_path_factory.mktemp("bare") / "model")
    with serving(tmp_path_factory.mktemp("server"), "--model", str(folder), *OPTIONS, runtime="local") as server:
        yield server.url


def post(url: str, route: str, **body: Any) -> Any:
    answer = httpx2.post(url + route, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def score(url: str, texts: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = post(url, "/v1/score", items=[{"text": text} for text in texts], **options)[
        "results"
    ]
    return results


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    return [value for row in rows for value in row]


def refusal(url: str, route: str, **body: Any) -> dict[str, Any]:
    answer = httpx2.post(url + route, json=body, timeout=60)
    problem: dict[str, Any] = answer.json()
    assert answer.status_code == problem["status"] == 422, answer.text
    return problem


def test_each_result_has_its_named_rewards_and_their_sum(url: str, expected: list[list[float]]) -> None:
    """Named rewards equal a plain transformers body with the head written out, and reward is their weighted sum."""
    for result, outputs in zip(score(url, TEXTS), expected, strict=True):
        assert list(result["rewards"]) == list(OUTPUTS)
        assert list(result["rewards"].values()) == pytest.approx(outputs, abs=1e-4)
        assert result["reward"] == pytest.approx(weighted_sum(list(result["rewards"].values()), WEIGHTS), abs=1e-12)


def test_neither_order_nor_company_changes_a_number(url: str) -> None:
    """Outputs of a text are the same alone, among others, and in any order."""
    together = {text: result["rewards"] for text, result in zip(TEXTS, score(url, TEXTS), strict=True)}
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))

    for text, result in zip(shuffled, score(url, shuffled), strict=True):
        assert result["rewards"] == pytest.approx(together[text], abs=1e-5)
    for text in TEXTS:
        assert score(url, [text])[0]["rewards"] == pytest.approx(together[text], abs=1e-5)


def test_weights_of_a_request_replace_those_of_the_model(url: str) -> None:
    """Each request gets the sum by its own weights, a name that is left out counts zero, and outputs stay the same."""
    outputs = [result["rewards"] for result in score(url, TEXTS)]
    for weights in ({"helpfulness": 1}, {"brevity": 2.5}, {"helpfulness": -1.0, "brevity": 1e-3}):
        for result, own in zip(score(url, TEXTS, weights=weights), outputs, strict=True):
            assert result["rewards"] == own
            assert result["reward"] == pytest.approx(weighted_sum(list(own.values()), weights), abs=1e-12)


def test_group_figures_are_of_the_weighted_sum(url: str) -> None:
    """The centred rewards of a group follow the weights of the request."""
    items = [{"prompt": "Say something.", "completion": text} for text in TEXTS[:3]]
    for weights in ({"helpfulness": 1.0}, {"brevity": 1.0}):
        results = post(url, "/v1/score", items=items, weights=weights)["results"]
        mean = sum(result["reward"] for result in results) / 3
        for result in results:
            assert result["group"]["reward_centered"] == pytest.approx(result["reward"] - mean, abs=1e-9)


def test_a_comparison_is_of_the_weighted_sum(url: str) -> None:
    """Rewards, probabilities and the best completion follow the weights of the request."""
    completions = list(TEXTS[:4])
    both = [
        post(url, "/v1/compare", prompt="Say something.", completions=completions, weights={"helpfulness": sign})
        for sign in (1, -1)
    ]

    assert both[0]["rewards"] == [-reward for reward in both[1]["rewards"]]
    assert both[0]["best"] == both[0]["rewards"].index(max(both[0]["rewards"]))
    assert both[0]["probabilities"][0][1] == pytest.approx(both[1]["probabilities"][1][0], abs=1e-12)
    assert all(set(result["rewards"]) == set(OUTPUTS) for result in both[0]["results"])


@pytest.mark.parametrize(
    ("weights", "pointer", "code"),
    [
        ({}, "/weights", "too_few"),
        ({"helpfulnes": 1}, "/weights", "out_of_range"),
        ({"helpfulness": "1"}, "/weights/...", "wrong_type"),
        ([1, 2], "/weights", "wrong_type"),
    ],
)
def test_wrong_weights_are_refused(url: str, weights: Any, pointer: str, code: str) -> None:
    """Weights that are empty, of an unknown output or of another type are errors with a pointer, on both routes."""
    for route, body in (
        ("/v1/score", {"items": [{"text": "a"}]}),
        ("/v1/compare", {"prompt": "p", "completions": ["a", "b"]}),
    ):
        problem = refusal(url, route, **body, weights=weights)
        assert problem["errors"][0]["pointer"].startswith(pointer.removesuffix("/..."))
        assert problem["errors"][0]["code"] == code


def test_the_model_says_how_its_reward_is_made(url: str, bare_url: str) -> None:
    """/v1/model lists outputs, weights and combination, and says where a model without weights has none."""
    rule = httpx2.get(f"{url}/v1/model").json()["reward_rule"]
    bare = httpx2.get(f"{bare_url}/v1/model").json()["reward_rule"]

    assert rule == {
        "outputs": list(OUTPUTS),
        "combination": "weights",
        "weights": WEIGHTS,
        "decided_by": "checkpoint",
    }
    assert bare == {"outputs": list(OUTPUTS), "combination": None, "weights": None, "decided_by": None}


def test_without_weights_there_is_no_reward(bare_url: str) -> None:
    """A model without weights answers its named rewards and no reward; with weights of the request it has one."""
    items = [{"prompt": "p", "completion": text} for text in TEXTS[:3]]
    for result in post(bare_url, "/v1/score", items=items)["results"]:
        assert set(result["rewards"]) == set(OUTPUTS)
        assert not {"reward", "group"} & result.keys()
    for result in post(bare_url, "/v1/score", items=items, weights=WEIGHTS)["results"]:
        assert result["reward"] == pytest.approx(weighted_sum(list(result["rewards"].values()), WEIGHTS), abs=1e-12)


SINGLE_REWARD_ROUTES: dict[str, dict[str, Any]] = {
    "/v1/compare": {"prompt": "p", "completions": ["a", "b"]},
    "/get_reward": {"query": ["a"]},
    "/rm": {"prompt": "p", "response": "a"},
    "/rm/dict": {"prompt": "p", "response": "a"},
    "/score": {"text_1": "p", "text_2": "a"},
    "/v1/score/evaluation": {"messages": ["a"]},
}


@pytest.mark.parametrize("route", SINGLE_REWARD_ROUTES)
def test_routes_that_need_one_reward_say_so(bare_url: str, route: str) -> None:
    """Where an answer has one reward, a model without weights is refused by a code of its own, before any work."""
    assert refusal(bare_url, route, **SINGLE_REWARD_ROUTES[route])["code"] == "weights_missing"


def test_vectors_have_every_output(url: str, bare_url: str, expected: list[list[float]]) -> None:
    """Protocols whose answers are vectors give all outputs, raw and in order, also without weights."""
    texts = TEXTS[:3]
    classes = post(url, "/classify", input=texts)["data"]
    assert [entry["num_classes"] for entry in classes] == [2] * 3
    vectors = {
        "classify": [entry["probs"] for entry in classes],
        "pooling": [entry["data"] for entry in post(url, "/pooling", input=texts)["data"]],
        "embeddings": [entry["embedding"] for entry in post(url, "/v1/embeddings", input=texts)["data"]],
        "predict": [
            [entry["score"] for entry in row] for row in post(url, "/predict", inputs=[[text] for text in texts])
        ],
    }
    for found in vectors.values():
        assert flat(found) == pytest.approx(flat(expected[:3]), abs=1e-4)
    packed = post(url, "/pooling", input=texts, encoding_format="base64")["data"]
    assert struct.unpack("<2f", base64.b64decode(packed[0]["data"])) == pytest.approx(expected[0], abs=1e-4)
    assert [entry["label"] for entry in post(url, "/predict", inputs="a")] == list(OUTPUTS)
    assert len(post(bare_url, "/pooling", input="a")["data"][0]["data"]) == 2
    assert len(post(bare_url, "/v1/score", query="p", items=["a"])["scores"][0]) == 2


def test_protocols_with_one_reward_name_the_others(url: str) -> None:
    """OpenRLHF and slime get the weighted sum as the reward, and each output under a name of its own."""
    answer = post(url, "/get_reward", query=TEXTS[:2])
    outputs = list(zip(*(answer["extra_logs"][f"rm_reward_{name}"] for name in OUTPUTS), strict=True))
    assert answer["rewards"] == pytest.approx([weighted_sum(row, WEIGHTS) for row in outputs], abs=1e-12)

    sample = post(url, "/rm/dict", prompt="p", response=TEXTS[0])
    own = [sample[f"reward_{name}"] for name in OUTPUTS]
    assert sample["reward"] == pytest.approx(weighted_sum(own, WEIGHTS), abs=1e-12)
    assert post(url, "/rm", prompt="p", response=TEXTS[0]) == pytest.approx(sample["reward"], abs=1e-6)


def test_kserve_has_a_column_for_each_output(url: str, bare_url: str) -> None:
    """The tensor rewards is [n, outputs], and reward [n, 1] is there only where there are weights."""
    texts = TEXTS[:2]
    inputs = [{"name": "sentences", "shape": [2, 1], "datatype": "BYTES", "data": texts}]

    def tensors(base: str) -> dict[str, Any]:
        name = httpx2.get(f"{base}/v1/model").json()["model"]["name"]
        outputs = post(base, f"/v2/models/{name}/infer", inputs=inputs)["outputs"]
        described = httpx2.get(f"{base}/v2/models/{name}").json()["outputs"]
        assert {entry["name"]: entry["shape"] for entry in described}["rewards"] == [-1, 2]
        return {entry["name"]: entry for entry in outputs}

    found = tensors(url)
    assert found["rewards"]["shape"] == [2, 2]
    vectors = [entry["data"] for entry in post(url, "/pooling", input=texts, add_special_tokens=False)["data"]]
    assert found["rewards"]["data"] == pytest.approx(flat(vectors), abs=1e-5)
    assert found["reward"]["shape"] == [2, 1]
    assert found["reward"]["data"] == pytest.approx([weighted_sum(row, WEIGHTS) for row in vectors], abs=1e-5)
    assert set(tensors(bare_url)) == {"rewards"}


def test_the_client_has_named_rewards_and_weights(url: str, bare_url: str) -> None:
    """Both clients pass weights on, and return the named rewards beside the weighted sum."""
    prompts, completions = ["p"] * 3, list(TEXTS[:3])
    with RewardClient(url) as client:
        items = client.score(prompts, completions, diagnostics="none", weights={"brevity": 2})
        assert [item.reward for item in items] == pytest.approx([2 * item.rewards["brevity"] for item in items])
        assert client.score(prompts, completions, weights={"brevity": 2}) == [item.reward for item in items]
        compared = client.compare("p", completions, weights={"brevity": 2})
        assert compared.rewards == pytest.approx([item.reward for item in items], abs=1e-5)
        rule = client.model().reward_rule
        assert (rule.outputs, rule.combination, rule.weights) == (OUTPUTS, "weights", WEIGHTS)
        with pytest.raises(RequestRejected, match="no output of this model"):
            client.score(prompts, completions, weights={"other": 1})
    with RewardClient(bare_url) as client:
        [item] = client.score(["p"], ["a"], diagnostics="none")
        assert item.reward is None
        assert set(item.rewards) == set(OUTPUTS)
        with pytest.raises(RewardMissing, match="helpfulness, brevity"):
            client.score(["p"], ["a"])
        with pytest.raises(RequestRejected, match="no weights"):
            client.compare("p", ["a", "b"])


async def test_the_asynchronous_client_has_named_rewards(url: str) -> None:
    """The asynchronous client returns the same results as the synchronous one."""
    async with AsyncRewardClient(url) as client:
        [item] = await client.score(["p"], [TEXTS[0]], diagnostics="basic", weights={"helpfulness": 1})
    assert item.reward == item.rewards["helpfulness"] == item.known_reward
    assert item.details.length is not None
    assert "rewards" not in item.diagnostics


def test_each_output_has_metrics_and_monitors(url: str) -> None:
    """Metrics and monitors have every output, and requests with own weights count in those of the outputs only."""

    def counts() -> dict[str, float]:
        families = text_string_to_metric_families(httpx2.get(f"{url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        found: dict[str, float] = {}
        for sample in samples:
            if sample.name in {"rm_reward_count", "rm_output_count"}:
                found[sample.labels.get("output", "reward")] = sample.value
        return found

    before = counts()
    assert set(before) == {"reward", *OUTPUTS}
    score(url, TEXTS[:4])
    score(url, TEXTS[:3], weights={"brevity": 5.0})
    added = {name: value - before[name] for name, value in counts().items()}
    assert added == {"reward": 4, "helpfulness": 7, "brevity": 7}

    post(url, "/v1/score", items=[{"prompt": f"p {text}", "completion": text} for text in TEXTS])
    readings = httpx2.get(f"{url}/v1/monitor").json()["monitors"]
    means = {reading["feature"]: reading for reading in readings if reading["name"] == "output_mean"}
    assert set(means) == set(OUTPUTS)
    assert all(reading["value"] is not None for reading in means.values())
    assert {r["feature"] for r in readings if r["name"] == "output_length_corr"} == set(OUTPUTS)


def test_settings_give_weights(tmp_path: Path) -> None:
    """Weights of the settings make the reward, change the model's version, and unknown names end the start."""
    folder = write_two_outputs(tmp_path / "model", weights=WEIGHTS)
    option = '{"brevity": 1.0}'
    with serving(
        tmp_path, "--model", str(folder), *OPTIONS, "--model.reward_weights", option, runtime="local"
    ) as server:
        [result] = score(server.url, ["a text"])
        assert result["reward"] == result["rewards"]["brevity"]
        rule = httpx2.get(f"{server.url}/v1/model").json()["reward_rule"]
        assert (rule["weights"], rule["decided_by"]) == ({"brevity": 1.0}, "settings")
