"""Bundles of models with several outputs compute the same outputs as the torch engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from several_outputs import PAIRS, scores_of, served
from tiny_layouts import HIDDEN_SIZE, random, store_armo_rm
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint

from export.convert import convert
from export.onnx.bundle_export import ExportPlan, export_bundle
from export.onnx.reward_comparison import Bounds
from export.token_logits import TokenLogits
from service.checkpoints.reward_description import LowerBound
from service.errors import InvalidRequest
from service.records import Encoding, Item, TemplatedText


def gated(folder: Path) -> None:
    """ArmoRM's head, whose gate reads a second token."""
    store_armo_rm(folder / "source")
    pattern = "<|im_end|>\n<|im_start|>assistant\n"
    convert(folder / "source", folder / "out", outputs=("one", "two", "three"), gate_pattern=pattern)


def ensemble(folder: Path) -> None:
    """Members with one layer each, and the mean less two standard deviations."""
    write_tiny_checkpoint(folder / "source")
    save_file({"weight": random(2, HIDDEN_SIZE)}, folder / "heads.safetensors")
    convert(folder / "source", folder / "out", members=(folder / "heads.safetensors",), combine=LowerBound(2.0))


def log_odds(folder: Path) -> None:
    """Two logits of a language model that caps them."""
    write_tiny_causal_lm(folder / "source", "gemma2", final_logit_softcapping=2.0)
    convert(folder / "source", folder / "out", token_logits=TokenLogits("log_odds", ("y", "n")))


def labels(folder: Path) -> None:
    """A decoder's classifier with three labels of a regression."""
    names = {0: "a", 1: "b", 2: "c"}
    write_tiny_checkpoint(folder / "out", num_labels=3, problem_type="regression", id2label=names)


@pytest.mark.parametrize("write", [gated, ensemble, log_odds, labels])
def test_a_bundle_has_the_outputs_of_the_checkpoint(write: Callable[[Path], None], tmp_path: Path) -> None:
    """Each output of each text is that of the torch engine, and so is the reward that the rule makes of them."""
    write(tmp_path)

    export_bundle(str(tmp_path / "out"), tmp_path / "bundle", ExportPlan("fp32", taps=(), bounds=Bounds(0.5, 0.9)))
    bundle = served(tmp_path / "bundle")
    found, expected = scores_of(bundle, PAIRS), scores_of(served(tmp_path / "out"), PAIRS)

    assert bundle.info.engine == "onnx"
    assert len(bundle.info.outputs) > 1
    for one, other in zip(found, expected, strict=True):
        assert one.outputs == pytest.approx(other.outputs, abs=1e-4)
        assert one.reward == (None if other.reward is None else pytest.approx(other.reward, abs=1e-4))
    if write is gated:
        (refused,) = bundle.tokenization.encode([Item(TemplatedText("no prompt"))], Encoding())
        assert isinstance(refused, InvalidRequest)


def test_the_layers_of_a_gate_are_not_quantized(tmp_path: Path) -> None:
    """An int8 bundle stores each layer of a gated head in fp32, bit for bit."""
    import onnx
    from onnx import numpy_helper

    gated(tmp_path)

    export_bundle(str(tmp_path / "out"), tmp_path / "bundle", ExportPlan("int8", taps=(), bounds=Bounds(0.5, 0.5)))

    graph = onnx.load(tmp_path / "bundle" / "model.onnx").graph
    stored = [torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer]
    head = load_file(tmp_path / "out" / "model.safetensors")
    for name in ("score.objectives.weight", "score.gate.0.weight", "score.gate.2.weight"):
        assert any(tensor.equal(head[name]) or tensor.equal(head[name].T) for tensor in stored if tensor.ndim == 2), (
            name
        )
