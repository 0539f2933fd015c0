"""Tiny ONNX bundles whose rewards can be calculated by hand, for tests without the exporter and torch.

The reward is the first element of the pooled token's embedding plus a tenth of the sum over all tokens' second
elements; the states are the tokens' rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tiny_models import MAX_POSITIONS, tiny_config, tiny_tokenizer

from service.checkpoints.bundle import (
    FORMAT_VERSION,
    GRAPH_FILE,
    ExportParity,
    Manifest,
    Probe,
    hash_bundle_files,
    read_manifest,
    write_manifest,
)
from service.checkpoints.checkpoint import Hashes
from service.records import StateTap

VOCABULARY, HIDDEN = 400, 8
TAPS = (StateTap(0, "mean"), StateTap(0, "last"))


def embedding() -> NDArray[np.float32]:
    """The one weight of the graph, float32 [VOCABULARY, HIDDEN]."""
    return np.random.default_rng(0).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)


def reward_by_hand(ids: Sequence[int], pooled: int | None = None) -> float:
    """The graph's reward of a text, pooled at its last token unless ``pooled`` is given."""
    rows = embedding()[list(ids)].astype(np.float64)
    return float(rows[-1 if pooled is None else pooled, 0] + 0.1 * rows[:, 1].sum())


def write_tiny_bundle(folder: Path, **changes: Any) -> Path:
    """Write a bundle whose tokenizer is the tiny Llama's; ``changes`` go into its manifest."""
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer("llama")
    tokenizer.save_pretrained(folder)
    tiny_config("llama", tokenizer, num_labels=1).save_pretrained(folder)
    write_tiny_graph(folder)
    names = sorted(file.name for file in folder.iterdir())
    probes = ((7, 8, 9), (30,), tuple(range(20, 60)))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        name="tiny",
        precision="fp32",
        architecture="LlamaForSequenceClassification",
        checkpoint_sha256=Hashes(config="c" * 64, weights="d" * 64, tokenizer="e" * 64, template="f" * 64),
        num_parameters=VOCABULARY * HIDDEN,
        stored_dtype="F32",
        has_linear_head=True,
        embedding_size=VOCABULARY,
        pad_token_id=tokenizer.pad_token_id,
        max_input_tokens=MAX_POSITIONS,
        opset_version=23,
        library_versions={},
        taps=TAPS,
        parity=ExportParity(1e-6, 1e-7, 1.0, 1.0, 64, "built-in"),
        probes=tuple(Probe(ids, reward_by_hand(ids)) for ids in probes),
        probe_tolerance=1e-4,
        files=hash_bundle_files(folder, names),
    )
    write_manifest(folder, replace(manifest, **changes))
    return folder


def change_manifest(folder: Path, **changes: Any) -> None:
    """Overwrite entries of the bundle's manifest."""
    write_manifest(folder, replace(read_manifest(folder), **changes))


def write_tiny_graph(folder: Path) -> None:
    """Write the graph with the inputs and outputs of an exported one."""
    matrix, vector = ["batch", "length"], ["batch"]
    inputs = [
        *(
            helper.make_tensor_value_info(name, TensorProto.INT64, matrix)
            for name in ("input_ids", "attention_mask", "position_ids")
        ),
        helper.make_tensor_value_info("pooled_position", TensorProto.INT64, vector),
        helper.make_tensor_value_info("mean_weights", TensorProto.FLOAT, matrix),
    ]
    outputs = [
        helper.make_tensor_value_info("reward", TensorProto.FLOAT, vector),
        helper.make_tensor_value_info("states", TensorProto.FLOAT, ["batch", len(TAPS), HIDDEN]),
    ]
    constants = {
        "embedding": embedding(),
        "first": np.array(0),
        "second": np.array(1),
        "axis_1": np.array([1]),
        "tenth": np.float32(0.1),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["tokens"]),
        helper.make_node("Unsqueeze", ["pooled_position", "axis_1"], ["index"]),
        helper.make_node("GatherND", ["tokens", "index"], ["last"], batch_dims=1),
        helper.make_node("Gather", ["last", "first"], ["pooled"], axis=1),
        helper.make_node("Gather", ["tokens", "second"], ["numbers"], axis=2),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "mask"], ["seen"]),
        helper.make_node("ReduceSum", ["seen", "axis_1"], ["sum"], keepdims=0),
        helper.make_node("Mul", ["sum", "tenth"], ["part"]),
        helper.make_node("Add", ["pooled", "part"], ["reward"]),
        helper.make_node("Unsqueeze", ["mean_weights", "axis_1"], ["weights"]),
        helper.make_node("MatMul", ["weights", "tokens"], ["mean"]),
        helper.make_node("Unsqueeze", ["last", "axis_1"], ["last_row"]),
        helper.make_node("Concat", ["mean", "last_row"], ["states"], axis=1),
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, folder / GRAPH_FILE)
