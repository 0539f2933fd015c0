"""The int8 graph is close to the fp32 graph, its rows are independent, and narrow weights are not quantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.onnx.quantization import (
    MIGRATION_STRENGTH,
    channel_magnitudes,
    quantize_graph,
    quantize_weight,
    smoothing_factors,
)
from service.checkpoints.bundle import GRAPH_DATA_FILE, GRAPH_FILE
from service.engines.onnx_session import session_options

DICE = np.random.default_rng(5)
WIDE = DICE.standard_normal((32, 48)).astype(np.float32)
ALSO_WIDE = DICE.standard_normal((32, 16)).astype(np.float32)
FEEDS = [{"x": DICE.standard_normal((1, 6, 32)).astype(np.float32)} for _ in range(3)]
NARROW = DICE.standard_normal((48, 1)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a graph of two wide matrix products of one input, and a head of one column."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 32])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", width])
        for name, width in (("a", 48), ("b", 16), ("head", 1))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "wide"], ["a"]),
        helper.make_node("MatMul", ["x", "also_wide"], ["b"]),
        helper.make_node("MatMul", ["a", "narrow"], ["head"]),
    ]
    weights = [
        numpy_helper.from_array(weight, name)
        for name, weight in (("wide", WIDE), ("also_wide", ALSO_WIDE), ("narrow", NARROW))
    ]
    graph = helper.make_graph(nodes, "graph", [x], outputs, weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / GRAPH_FILE
    )
    return tmp_path


def run(folder: Path, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(
        folder / GRAPH_FILE, session_options(None), providers=["CPUExecutionProvider"]
    )
    outputs: list[NDArray[np.float32]] = session.run(["a", "b", "head"], {"x": x})
    return outputs


def texts(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(6).standard_normal((*shape, 32)).astype(np.float32)


def operators(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(folder / GRAPH_FILE).graph.node]


def test_products_have_a_small_error(folder: Path) -> None:
    """With eight bits per row and per column the root mean square error is below two percent of the deviation."""
    x = texts(3, 7)

    assert quantize_graph(folder, FEEDS) == 2
    a, b, _ = run(folder, x)

    for product, exact in ((a, x @ WIDE), (b, x @ ALSO_WIDE)):
        assert np.sqrt(((product - exact) ** 2).mean()) < 0.02 * exact.std()


def test_the_graph_is_the_same_without_vnni(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's mode for CPUs without VNNI gives the same bits, because products of integers are exact."""
    quantize_graph(folder, FEEDS)
    x = texts(3, 7)
    exact = run(folder, x)

    monkeypatch.setattr("service.engines.devices.device.multiplies_int8_exactly", lambda: False)

    for other, product in zip(run(folder, x), exact, strict=True):
        assert np.array_equal(other, product)


def test_a_row_does_not_depend_on_other_rows(folder: Path) -> None:
    """Another row that is a thousand times larger changes no bit, as it would with one scale per batch."""
    quantize_graph(folder, FEEDS)
    x = texts(2, 5)
    alone = run(folder, x[:1])
    x[1] *= 1000

    for batched, single in zip(run(folder, x), alone, strict=True):
        assert np.array_equal(batched[:1], single)


def test_rows_of_zeros_stay_zero(folder: Path) -> None:
    """Their scale has a lower limit, so nothing is divided by zero."""
    quantize_graph(folder, FEEDS)

    for product in run(folder, np.zeros((1, 2, 32), dtype=np.float32)):
        assert (product == 0).all()


def test_the_head_is_left_in_fp32_and_inputs_are_quantized_once(folder: Path) -> None:
    """Weights of few columns stay in fp32; products of the same input share its quantized rows."""
    quantize_graph(folder, FEEDS)

    found = operators(folder)
    assert found.count("MatMul") == 1
    assert found.count("MatMulIntegerToFloat") == 2
    assert found.count("QuantizeLinear") == 1


def test_fp32_weights_do_not_remain(folder: Path) -> None:
    """Replaced weights are removed from the file, which would otherwise be larger than in fp32."""
    quantize_graph(folder, FEEDS)

    names = {tensor.name for tensor in onnx.load(folder / GRAPH_FILE).graph.initializer}
    assert "narrow" in names
    assert not {"wide", "also_wide"} & names


def test_quantized_weights_use_the_whole_range() -> None:
    """The largest weight of each column becomes 127, and the scales restore the weights up to rounding."""
    integers, scale = quantize_weight(WIDE)

    assert (np.abs(integers).max(axis=0) == 127).all()
    assert np.abs(integers * scale - WIDE).max() <= scale.max() / 2 + 1e-6


def test_external_weights_remain_external(folder: Path) -> None:
    """A graph with weights in a separate file has two files afterwards, without the replaced weights."""
    model = onnx.load(folder / GRAPH_FILE)
    (folder / GRAPH_FILE).unlink()
    onnx.save(model, folder / GRAPH_FILE, save_as_external_data=True, location=GRAPH_DATA_FILE, size_threshold=0)
    exact = run(folder, texts(1, 4))[0]

    quantize_graph(folder, FEEDS)

    assert (folder / GRAPH_DATA_FILE).is_file()
    assert np.abs(run(folder, texts(1, 4))[0] - exact).max() < 0.2


def test_an_outlier_channel_does_not_reduce_the_precision_of_others(folder: Path) -> None:
    """Its magnitude is moved into the weights, so the error is at most a third of the one without smoothing."""
    outlier = np.ones(32, dtype=np.float32)
    outlier[3] = 100.0
    x = texts(3, 7) * outlier
    exact = run(folder, x)[0]

    quantize_graph(folder, [{"x": feed["x"] * outlier} for feed in FEEDS])
    error = np.sqrt(((run(folder, x)[0] - exact) ** 2).mean())

    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    plain_error = np.sqrt((((np.rint(x / scale) * scale) @ WIDE - exact) ** 2).mean())
    assert error < plain_error / 3


def test_channel_magnitudes_are_measured_at_quantized_products(folder: Path) -> None:
    """The largest magnitude over all texts and tokens, by the name of the activation; narrow weights have none."""
    magnitudes = channel_magnitudes(folder, FEEDS)

    assert set(magnitudes) == {"x"}
    assert np.allclose(magnitudes["x"], np.abs(np.concatenate([feed["x"] for feed in FEEDS])).max(axis=(0, 1)))


def test_a_channel_that_is_always_zero_is_not_scaled() -> None:
    """Its factor is 1; the factor of the others is their magnitude to the power of the migration strength."""
    factors = smoothing_factors(
        np.array([0.0, 4.0, 9.0], dtype=np.float32), np.array([1.0, 1.0, 0.0], dtype=np.float32)
    )

    assert factors.tolist() == pytest.approx([1.0, 4.0**MIGRATION_STRENGTH, 1.0])
