"""The demo model in a real server: its rewards are those of plain transformers, in both precisions.

The texts are human preference pairs if the environment variable ``PREFERENCE_PAIRS`` names a file of them, else texts
of similar lengths made of common words.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from reward_client import RewardClient
from scipy.stats import spearmanr
from serving import RunningServer, serving
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from export.onnx.bundle_export import ExportPlan, export_bundle
from loadtest.workload import draw_groups
from service.checkpoints.bundle import open_bundle
from service.checkpoints.checkpoint import open_checkpoint
from service.checkpoints.demo import obtain_demo_model
from service.data.rows import read_rows
from service.engines.onnx import load_onnx_engine
from service.engines.torch import load_torch_engine
from service.records import TokenSequence
from service.settings import BatchingSettings, ModelSettings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_PAIRS = 110
LONGEST_CHARS = 800


@dataclass(frozen=True)
class Texts:
    """Prompts as messages, and completions; the chosen one of a pair is followed by the rejected one."""

    prompts: list[list[dict[str, str]]] = field(repr=False)
    completions: list[str] = field(repr=False)

    @property
    def conversations(self) -> list[list[dict[str, str]]]:
        """Prompt and completion as messages for a chat template."""
        return [
            [*prompt, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(self.prompts, self.completions, strict=True)
        ]


@pytest.fixture(scope="module")
def texts() -> Texts:
    pairs = _human_pairs() if os.environ.get("PREFERENCE_PAIRS") else _made_up_pairs()
    return Texts(
        [prompt for prompt, _, _ in pairs for _ in range(2)],
        [completion for _, chosen, rejected in pairs for completion in (chosen, rejected)],
    )


def _human_pairs() -> list[Any]:
    rows = (row.values for row in read_rows(Path(os.environ["PREFERENCE_PAIRS"])))
    short = (row for row in rows if len(str(row["prompt"])) + len(row["chosen"] + row["rejected"]) < LONGEST_CHARS)
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in islice(short, NUM_PAIRS)]


def _made_up_pairs() -> list[Any]:
    groups = draw_groups(NUM_PAIRS, 2, seed=7)
    return [([{"role": "user", "content": group.prompt[:LONGEST_CHARS]}], *group.completions) for group in groups]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return obtain_demo_model()


@pytest.fixture(scope="module")
def plain_rewards(checkpoint: Path, texts: Texts) -> np.ndarray:
    """Rewards of plain transformers in fp32, one text at a time; float64 [item]."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rewards = []
    with torch.inference_mode():
        for conversation in texts.conversations:
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            rewards.append(model(**inputs).logits[0, 0].item())
    return np.array(rewards)


@pytest.fixture(scope="module")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with serving(tmp_path_factory.mktemp("demo"), "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def served_rewards(demo_server: RunningServer, texts: Texts) -> np.ndarray:
    with RewardClient(demo_server.url, deadline_s=600) as client:
        return np.array(client.score(texts.prompts, texts.completions))


def test_served_rewards_are_plain_transformers(served_rewards: np.ndarray, plain_rewards: np.ndarray) -> None:
    """At least 200 items over HTTP in fp32: within 1e-4 of plain transformers, and in the same order."""
    assert len(served_rewards) >= 200
    assert np.abs(served_rewards - plain_rewards).max() <= 1e-4
    order = np.argsort(plain_rewards)
    steps = np.diff(served_rewards[order])
    distinguishable = np.diff(plain_rewards[order]) > 2e-5
    assert (steps[distinguishable] > 0).all()


def test_served_pair_accuracy_equals_the_offline_one(served_rewards: np.ndarray, plain_rewards: np.ndarray) -> None:
    """The share of pairs that the service ranks as people did is the one computed offline."""
    served = served_rewards[0::2] > served_rewards[1::2]
    plain = plain_rewards[0::2] > plain_rewards[1::2]

    assert served.mean() == plain.mean()


@pytest.mark.soak
def test_bfloat16_ranks_as_fp32_does(checkpoint: Path, texts: Texts, plain_rewards: np.ndarray) -> None:
    """Rewards in bfloat16 have the rank order of plain fp32 rewards of human texts: Spearman at least 0.999."""
    # Rewards of random words are close together, so the same rounding changes more ranks.
    minimum = 0.999 if os.environ.get("PREFERENCE_PAIRS") else 0.99
    settings = ModelSettings(dtype="bfloat16", device="cpu")
    opened = open_checkpoint(checkpoint, settings)
    engine = load_torch_engine(
        checkpoint,
        settings,
        BatchingSettings(),
        pad_token_id=opened.pad_token_id,
        max_input_tokens=opened.max_input_tokens,
    )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rendered = tokenizer.apply_chat_template(texts.conversations, tokenize=False)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]

    rewards = [engine.forward([TokenSequence(tuple(text))]).rewards[0] for text in ids]

    assert spearmanr(rewards, plain_rewards).statistic >= minimum


@pytest.fixture(scope="module")
def onnx_server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("onnx")
    export_bundle("demo", folder / "demo", ExportPlan())
    with serving(folder, "--engine", "onnx", "--model", str(folder / "demo")) as server:
        yield server


@pytest.mark.soak
def test_the_onnx_engine_serves_what_plain_transformers_computes(
    onnx_server: RunningServer, texts: Texts, plain_rewards: np.ndarray
) -> None:
    """The exported demo model over HTTP, at least 200 items in fp32: within 1e-4 of plain transformers."""
    with RewardClient(onnx_server.url, deadline_s=900) as client:
        served = np.array(client.score(texts.prompts, texts.completions))

    assert len(served) >= 200
    assert np.abs(served - plain_rewards).max() <= 1e-4


@pytest.mark.soak
def test_the_onnx_server_reports_its_engine(onnx_server: RunningServer) -> None:
    """``/v1/model`` reports engine, arithmetic, providers and the parity of the export."""
    engine = httpx2.get(f"{onnx_server.url}/v1/model").json()["engine"]

    assert (engine["engine"], engine["dtype"], engine["providers"]) == ("onnx", "float32", ["CPUExecutionProvider"])
    assert engine["parity"]["max_difference"] <= 1e-4


@pytest.mark.soak
def test_int8_ranks_as_fp32_does(texts: Texts, plain_rewards: np.ndarray, tmp_path: Path) -> None:
    """Rewards of the int8 bundle have the rank order of plain fp32 rewards of human texts: Spearman at least 0.99."""
    # Rewards of random words lie within a few tenths, so the same rounding changes more ranks.
    minimum = 0.99 if os.environ.get("PREFERENCE_PAIRS") else 0.9
    export_bundle("demo", tmp_path / "demo", ExportPlan(precision="int8"))
    settings = ModelSettings(path=str(tmp_path / "demo"), device="cpu")
    bundle = open_bundle(tmp_path / "demo", settings)
    engine = load_onnx_engine(bundle, settings, BatchingSettings())
    rendered = bundle.checkpoint.tokenizer.apply_chat_template(texts.conversations, tokenize=False)
    ids = bundle.checkpoint.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    rewards = [engine.forward([TokenSequence(tuple(text))]).rewards[0] for text in ids]

    assert spearmanr(rewards, plain_rewards).statistic >= minimum
