"""``reward-export`` writes a bundle only if its rewards agree with those of plain transformers."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from tiny_bundles import write_tiny_graph
from tiny_models import FAMILIES, write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModel, AutoModelForSequenceClassification

from export.onnx import bundle_export
from export.onnx.bundle_export import ExportPlan, choose_probes, export_bundle, probe_tolerance
from export.onnx.command import main, parse_tap
from export.onnx.reward_comparison import Bounds
from service.assembly import assemble
from service.checkpoints.bundle import GRAPH_FILE, open_bundle, read_manifest
from service.checkpoints.files import BUNDLE_MANIFEST_FILE
from service.checkpoints.reward_description import (
    LayeredHead,
    LinearLayer,
    RewardDescription,
    write_description,
)
from service.engines.onnx import OnnxEngine, load_onnx_engine
from service.engines.torch import load_torch_engine
from service.errors import CheckpointError, OutputError, ParityError
from service.records import Encoding, Exchange, Item, Score, ScoreRequest, StateTap, TokenSequence
from service.settings import BatchingSettings, ModelSettings, Settings

ITEMS = [{"prompt": f"How do I boil {number} eggs?", "completion": "In water. " * (number + 1)} for number in range(12)]
pytestmark = pytest.mark.timeout(900)  # the tracer is slow where other processes use the cores too

TAPS = (StateTap(0, "mean"), StateTap(1, "mean"), StateTap(2, "last"), StateTap(3, "mean"), StateTap(3, "last"))


@pytest.fixture(autouse=True)
def few_threads():
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("items") / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ITEMS))
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def llama_bundle(llama: Path, items: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "llama"
    export_bundle(str(llama), out, ExportPlan(items=items))
    return out


def random_rows(vocabulary: int, lengths: tuple[int, ...] = (1, 2, 9, 40, 130, 33)) -> list[tuple[int, ...]]:
    dice = np.random.default_rng(3)
    return [tuple(int(token) for token in dice.integers(5, vocabulary, length)) for length in lengths]


def engine_of(out: Path) -> OnnxEngine:
    settings = ModelSettings(path=str(out), device="cpu", num_threads=1)
    return load_onnx_engine(open_bundle(out, settings), settings, BatchingSettings())


def plain(folder: Path, rows: list[tuple[int, ...]]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]


def test_rewards_of_the_bundle_are_those_of_plain_transformers(llama: Path, llama_bundle: Path) -> None:
    """For sequences of different lengths in one batch, which were not used for tracing, they agree within 1e-4."""
    engine = engine_of(llama_bundle)
    rows = random_rows(engine._padding.pad_token_id + 300)

    rewards = engine.forward([TokenSequence(row) for row in rows]).rewards

    assert list(rewards) == pytest.approx(plain(llama, rows), abs=1e-4)


def test_the_manifest_has_the_hash_of_every_file_but_itself(llama: Path, llama_bundle: Path) -> None:
    """Graph, tokenizer, template and configuration are hashed; it also has parity, opset and library versions."""
    manifest = read_manifest(llama_bundle)

    assert set(manifest.files) == {file.name for file in llama_bundle.iterdir()} - {BUNDLE_MANIFEST_FILE}
    assert {GRAPH_FILE, "config.json", "tokenizer.json", "chat_template.jinja"} <= set(manifest.files)
    assert manifest.parity.max_difference <= 1e-4
    assert (manifest.parity.num_texts, manifest.parity.text_source) == (len(ITEMS), "items.jsonl")
    assert (manifest.opset_version, manifest.precision, manifest.has_linear_head) == (23, "fp32", True)
    assert {"torch", "transformers", "onnxruntime"} <= set(manifest.library_versions)
    assert manifest.probes


async def test_bundle_and_checkpoint_are_served_with_the_same_rewards(llama: Path, llama_bundle: Path) -> None:
    """With the engine ``auto`` both folders give the same rewards through the whole service, and the same version."""
    model = {"device": "cpu", "dtype": "float32", "num_threads": 1, "name": "llama"}
    rewards, versions = [], []
    for folder in (llama, llama_bundle):
        served = assemble(Settings.model_validate({"model": {**model, "path": str(folder)}}))
        await served.scorer.start()
        try:
            request = ScoreRequest(
                tuple(Item(Exchange(row["prompt"], row["completion"])) for row in ITEMS), Encoding(), "none", 60.0
            )
            result = await asyncio.wait_for(served.scorer.score(request), 60)
        finally:
            await served.scorer.stop(0)
        rewards.append([outcome.reward for outcome in result.outcomes if isinstance(outcome, Score)])
        versions.append(served.description()["model"]["version"])

    assert len(rewards[0]) == len(ITEMS)
    assert rewards[0] == pytest.approx(rewards[1], abs=1e-4)
    assert versions[0] == versions[1]


def test_a_graph_that_disagrees_is_not_written(llama: Path, items: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The graph of another model is detected, and no folder remains, complete or incomplete."""
    monkeypatch.setattr(
        bundle_export, "_write_graph", lambda folder, _checkpoint, _plan, _taps: write_tiny_graph(folder)
    )
    plan = ExportPlan(items=items, taps=(StateTap(0, "mean"), StateTap(0, "last")))

    with pytest.raises(ParityError, match="Nothing was written"):
        export_bundle(str(llama), tmp_path / "out", plan)

    assert list(tmp_path.iterdir()) == []


def test_wider_bounds_accept_a_graph(llama: Path, items: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The caller may set other bounds; the manifest reports the accepted difference."""
    monkeypatch.setattr(
        bundle_export, "_write_graph", lambda folder, _checkpoint, _plan, _taps: write_tiny_graph(folder)
    )
    (llama / "calibration.safetensors").write_bytes(b"fitted")
    plan = ExportPlan(items=items, taps=(StateTap(0, "mean"), StateTap(0, "last")), bounds=Bounds(min_spearman=-1.0))

    manifest = export_bundle(str(llama), tmp_path / "out", plan)
    (llama / "calibration.safetensors").unlink()

    assert manifest.parity.max_difference > 1e-3
    assert (tmp_path / "out" / "calibration.safetensors").read_bytes() == b"fitted"
    assert "calibration.safetensors" not in manifest.files


def test_the_command_prints_the_reason_of_a_refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a model without a scalar head the status is 1, and the message is that of the validation."""
    folder = write_tiny_causal_lm(tmp_path / "model")

    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert "no scalar head" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(llama: Path, tmp_path: Path) -> None:
    """A folder that is not empty is not changed."""
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(OutputError, match="not empty"):
        export_bundle(str(llama), tmp_path, ExportPlan())


def test_rotary_frequencies_that_change_with_the_length_are_refused(llama: Path, tmp_path: Path) -> None:
    """A graph has one set of frequencies, so such a model is refused before anything is traced."""
    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    factors = [1.0] * 8
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": factors,
        "long_factor": [2.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match="frequencies"):
        export_bundle(str(folder), tmp_path / "out", ExportPlan())


def test_probes_are_spread_over_the_lengths() -> None:
    """They include the shortest sequence and the longest one below the limit for probes, and none above it."""
    sequences = [TokenSequence((1,) * length) for length in (300, 5, 10, 20, 40, 80, 160, 250, 900)]
    outputs = [[float(sequence.num_tokens)] for sequence in sequences]

    probes = choose_probes(sequences, outputs, count=4)

    assert [len(probe.token_ids) for probe in probes] == [5, 20, 80, 250]
    assert all(probe.reward == len(probe.token_ids) for probe in probes)


def test_tolerances_follow_the_precision() -> None:
    """In fp32 only rounding is accepted; in lower precisions a part of the standard deviation of the rewards."""
    assert probe_tolerance("fp32", [0.5, -4.0]) == pytest.approx(4e-4)
    assert probe_tolerance("int8", [-1.0, 1.0]) == pytest.approx(0.05)


@pytest.mark.parametrize("text", ["mean", "3", "3:max", "x:mean"])
def test_taps_have_a_layer_and_a_pooling(text: str) -> None:
    """``12:mean`` is parsed; other forms are errors."""
    assert parse_tap("12:mean") == StateTap(12, "mean")
    with pytest.raises(ValueError, match=r".*"):
        parse_tap(text)


def test_pairs_with_token_types_are_refused(items: Path, tmp_path: Path) -> None:
    """A graph has no input for token types, so a model that reads pairs of texts with them gets no bundle."""
    folder = write_tiny_checkpoint(tmp_path / "model", "bert")

    with pytest.raises(CheckpointError, match="reads pairs of texts with token types"):
        export_bundle(str(folder), tmp_path / "out", ExportPlan(items=items))

    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "bert"])
def test_every_family_is_exported(family: str, items: Path, tmp_path: Path) -> None:
    """Rewards and states of the graph are those of plain transformers and of the torch engine, in one padded batch."""
    folder = write_tiny_checkpoint(tmp_path / "model", family)
    export_bundle(str(folder), tmp_path / "out", ExportPlan(items=items, taps=TAPS))
    engine = engine_of(tmp_path / "out")
    settings = ModelSettings(path=str(folder), device="cpu", dtype="float32", num_threads=1)
    pad = read_manifest(tmp_path / "out").pad_token_id
    torch_engine = load_torch_engine(
        folder, settings, BatchingSettings(), pad_token_id=pad, max_input_tokens=512, taps=TAPS
    )
    rows = random_rows(120)
    sequences = [TokenSequence(row, len(row) // 2) for row in rows]

    output = engine.forward(sequences, states=True)
    expected = torch_engine.forward(sequences, states=True)

    assert list(output.rewards) == pytest.approx(plain(folder, rows), abs=1e-4)
    assert output.states is not None
    assert expected.states is not None
    assert np.abs(output.states - expected.states).max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), [("qwen2", "int8"), ("modernbert", "int8"), ("qwen2", "fp16")])
def test_lower_precisions_preserve_the_order(family: str, precision: Any, tmp_path: Path) -> None:
    """Ranks of the built-in texts agree with fp32 within the default bound, and batch composition changes little."""
    folder = write_tiny_checkpoint(tmp_path / "model", family)

    manifest = export_bundle(str(folder), tmp_path / "out", ExportPlan(precision=precision))

    engine = engine_of(tmp_path / "out")
    rows = random_rows(120)
    together = engine.forward([TokenSequence(row) for row in rows]).rewards
    alone = [engine.forward([TokenSequence(row)]).rewards[0] for row in rows]
    assert manifest.parity.spearman >= 0.99
    assert np.abs(np.array(together) - np.array(alone)).max() < 1e-2


@pytest.mark.slow
def test_a_described_head_is_exported_in_fp32(llama: Path, items: Path, tmp_path: Path) -> None:
    """A head of two layers, pooled at the last token, has its rewards in an int8 bundle too: no layer is quantized."""
    checkpoint = tmp_path / "described"
    shutil.copytree(llama, checkpoint)
    dice = torch.Generator().manual_seed(7)
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("score.weight")
    head = {
        "score.0.weight": torch.randn(64, 64, generator=dice) / 8,
        "score.2.weight": torch.randn(1, 64, generator=dice),
    }
    save_file(weights | head, checkpoint / "model.safetensors", {"format": "pt"})
    layers = (LinearLayer("score.0.weight", None, "relu"), LinearLayer("score.2.weight"))
    write_description(checkpoint, RewardDescription(LayeredHead(layers), pooling="last"))
    row = (5, 6, 7, 0, 0)
    with torch.inference_mode():
        state = AutoModel.from_pretrained(llama)(torch.tensor([row])).last_hidden_state[0, -1]
        inner = torch.relu(head["score.0.weight"] @ state)
        expected = float(head["score.2.weight"][0] @ inner)

    for precision in ("fp32", "int8"):
        plan = ExportPlan(precision, items=items, taps=(), bounds=Bounds(0.5, 0.9))
        export_bundle(str(checkpoint), tmp_path / precision, plan)
        (reward,) = engine_of(tmp_path / precision).forward([TokenSequence(row)]).rewards
        assert reward == pytest.approx(expected, abs=1e-4 if precision == "fp32" else 0.3)
        graph = onnx.load(tmp_path / precision / GRAPH_FILE).graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        first = head["score.0.weight"].numpy()
        assert any(np.array_equal(tensor, first) or np.array_equal(tensor, first.T) for tensor in stored.values())
