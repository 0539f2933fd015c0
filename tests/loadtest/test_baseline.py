"""The plain server returns correct rewards, so that a comparison with it has a meaning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loadtest.padded_server import Item, PaddedScorer, make_app
from loadtest.peer_servers.item_batcher import MAX_BATCH_ITEMS
from loadtest.random_checkpoint import ModelShape, write_random_checkpoint
from loadtest.workload import LengthDistribution, draw_groups

SHORT = LengthDistribution(median=12, sigma=0.8, longest=60)
TINY = ModelShape(vocabulary=1024, hidden=32, intermediate=64, layers=2, heads=4, kv_heads=2, positions=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("tiny"), TINY, dtype="float32")


def test_rewards_equal_plain_transformers(checkpoint: Path) -> None:
    """Each item's reward over HTTP, from padded batches, is that of transformers for the item alone."""
    items = [item for group in draw_groups(5, 4, seed=1, prompts=SHORT, completions=SHORT) for item in group.items]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1, dtype=torch.float32).eval()
    with torch.inference_mode():
        alone = [
            model(**tokenizer(item["prompt"] + item["completion"], return_tensors="pt")).logits.item() for item in items
        ]

    with TestClient(make_app(PaddedScorer(checkpoint, torch.float32))) as client:
        answer = client.post("/v1/score", json={"items": items}).json()

    assert [result["index"] for result in answer["results"]] == list(range(len(items)))
    assert [result["reward"] for result in answer["results"]] == pytest.approx(alone, abs=1e-5)


def test_a_bulk_request_is_split_into_batches_of_sixteen_in_arrival_order(checkpoint: Path) -> None:
    """The plain server batches in arrival order: it neither sorts nor shares prefixes."""
    scorer = PaddedScorer(checkpoint, torch.float32)
    batches: list[list[str]] = []
    score = scorer.score

    def record(items: list[Item]) -> list[float]:
        batches.append([item.prompt for item in items])
        return score(items)

    scorer.score = record  # type: ignore[method-assign]  # the test observes this one scorer
    items = [{"prompt": f"word {number}", "completion": " end"} for number in range(MAX_BATCH_ITEMS * 2 + 3)]

    with TestClient(make_app(scorer)) as client:
        assert client.post("/v1/score", json={"items": items}).status_code == 200

    assert [len(batch) for batch in batches] == [16, 16, 3]
    assert [item["prompt"] for item in items] == [prompt for batch in batches for prompt in batch]


def test_an_error_fails_its_batch_and_not_the_next(checkpoint: Path) -> None:
    """An error reaches the callers of that batch, and the server continues."""
    scorer = PaddedScorer(checkpoint, torch.float32)
    score = scorer.score
    outcomes = iter([True, False])

    def fail_once(items: list[Item]) -> list[float]:
        if next(outcomes):
            raise RuntimeError("the first batch fails")
        return score(items)

    scorer.score = fail_once  # type: ignore[method-assign]  # only this one scorer fails
    body = {"items": [{"prompt": "a", "completion": " b"}]}

    with TestClient(make_app(scorer), raise_server_exceptions=False) as client:
        assert client.post("/v1/score", json=body).status_code == 500
        assert client.post("/v1/score", json=body).status_code == 200
